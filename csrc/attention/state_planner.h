// The dispatches of a call that makes its coarse rows, and corrects them by the state.
#pragma once

#include "attention/plan_builder.h"

namespace jax_aat {

// Coarse rows, the state and, unless attention makes them itself, the biases it gives them.
void AddMeans(PlanBuilder& builder, bool with_level_biases);

// Scratch for the shares that the correction reads, where they are no result.
void AddShares(PlanBuilder& builder);

// What the state adds to the output of attention.
void AddCorrection(PlanBuilder& builder);

// The gradient's twin of the correction, before the passes of attention: they take cotangents of
// shares from it, and leave the gradients of coarse rows and level biases where it says.
void AddCotangents(PlanBuilder& builder);

// What comes to q, k and v through coarse rows and state, after these passes.
void AddMeansGradients(PlanBuilder& builder);

}  // namespace jax_aat
