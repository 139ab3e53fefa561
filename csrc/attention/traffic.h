// How many bytes the kernels of a plan have to move at least.
#pragma once

#include <array>
#include <cstdint>

#include "attention/dispatch_plan.h"

namespace jax_aat {

// Of operands that cross the FFI boundary; 0: absent, or scratch.
using OperandBytes = std::array<std::uint64_t, OPERAND_COUNT>;

// Bytes of the operands and the scratch that a dispatch reads and writes, each once; NaN for
// kernels that make lists, whose bytes depend on the plan, and for a pass over marked tiles.
double Traffic(const DispatchPlan& plan, const Dispatch& dispatch, const OperandBytes& operands);

}  // namespace jax_aat
