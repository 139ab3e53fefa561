// Attention on the CUDA platform of JAX: operands in GPU memory, ordered on XLA's stream; the call
// returns before the work is done.
#pragma once

#include "attention/problem.h"
#include "interop/cuda_driver.h"
#include "interop/operands.h"

namespace jax_aat {

// Throws Error, or std::invalid_argument where no kernel serves the problem.
void RunOnCuda(const AttentionProblem& problem, const OperandBuffers& buffers, cuda::Stream stream);

}  // namespace jax_aat
