// Limits of the kernels, checked before anything is planned.
#pragma once

#include <cstdint>

#include "attention/dispatch_plan.h"
#include "attention/problem.h"

namespace jax_aat {

// Operands that hide keys, with the features that say they are given.
struct MaskingOperand {
  std::uint32_t slot;
  std::uint32_t feature;
};
inline constexpr MaskingOperand kMaskingOperands[] = {
    {OPERAND_MASK, FEATURE_MASK},
    {OPERAND_Q_LENGTHS, FEATURE_Q_LENGTHS},
    {OPERAND_KV_LENGTHS, FEATURE_KV_LENGTHS},
    {OPERAND_Q_SEGMENTS, FEATURE_SEGMENTS},
    {OPERAND_KV_SEGMENTS, FEATURE_SEGMENTS},
};

// All of them throw std::invalid_argument, in words for the user.
void CheckProblem(const AttentionProblem& problem, const DeviceTraits& traits);
// Shaders index elements with 31 bits.
void CheckIndex(std::uint64_t elements, const char* what);
std::uint32_t CheckedStride(std::uint64_t stride);

}  // namespace jax_aat
