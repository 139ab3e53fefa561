// Attention on the CUDA platform of JAX: operands in GPU memory, ordered on XLA's stream; the call
// returns before the work is done.
#pragma once

#include <cstdint>
#include <functional>

#include "attention/problem.h"
#include "interop/cuda_driver.h"
#include "interop/operands.h"

namespace jax_aat {

// `allocate_scratch` gives device memory until the call returns, null where there is none. Throws
// Error, or std::invalid_argument where no kernel serves the problem.
void RunOnCuda(const AttentionProblem& problem, const OperandBuffers& buffers, cuda::Stream stream,
               const std::function<void*(std::uint64_t)>& allocate_scratch);

}  // namespace jax_aat
