// Attention on the CPU platform of JAX: operands in host memory, the call returns when they are
// done.
#pragma once

#include "attention/problem.h"
#include "interop/operands.h"

namespace jax_aat {

// Throws Error, or std::invalid_argument where no kernel serves the problem.
void RunOnHost(const AttentionProblem& problem, const OperandBuffers& buffers);

}  // namespace jax_aat
