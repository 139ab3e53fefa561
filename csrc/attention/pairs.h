// How many pairs of a query and a key a call computes.
#pragma once

#include "attention/problem.h"

namespace jax_aat {

// Number of pairs (t, s) of all batch entries and heads that the causal mask and the window leave;
// lengths, segments and masks are known on the device only.
double CountPairs(const AttentionProblem& problem);

}  // namespace jax_aat
