// An attention call in the form that every Vulkan device understands: shapes, strides and options,
// no buffers. Made by the FFI handlers, read by the planner.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "common/params.h"

namespace jax_aat {

// As users know them, by their number (DTYPE_F32 and so on).
inline constexpr std::string_view kDtypeNames[] = {"float32", "float16", "bfloat16"};

enum class Pass { kForward, kTangent, kBackward, kPlan };

struct AttentionProblem {
  Pass pass = Pass::kForward;
  std::uint32_t dtype = DTYPE_F32;       // of q, k, v, out and their tangents or gradients
  std::uint32_t bias_dtype = DTYPE_F32;  // of bias and its tangent or gradient
  std::uint32_t features = 0;            // FEATURE_* bits
  // Shapes, strides and options; the addresses and list strides are still zero.
  AttentionParams params = {};
  // Of a plan that it makes, what is not kept is scratch.
  bool keeps_levels = true;  // and headers and lambda
  bool keeps_lists = true;   // their entries; only with levels
  bool counts_work = false;  // that a plan leaves is counted, into OPERAND_WORK_COUNTS
  // dbias: extents of the gradient of bias [batch axes, heads, queries, keys] where a size of 1
  // means that the backward pass sums over the axis.
  std::array<std::uint32_t, MAX_BATCH_AXES + 3> dbias_extent = {};
};

}  // namespace jax_aat
