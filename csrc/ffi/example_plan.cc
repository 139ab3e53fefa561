#include "ffi/example_plan.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>

namespace jax_aat {
namespace {

constexpr std::uint32_t kLength = 1024;
constexpr std::uint32_t kHeads = 8;
constexpr std::uint32_t kDenseOperands[] = {OPERAND_Q,  OPERAND_K,  OPERAND_V,  OPERAND_OUT,
                                            OPERAND_DQ, OPERAND_DK, OPERAND_DV, OPERAND_DOUT};

// Index of the name, which is the value of the enumeration or constant it stands for.
template <std::size_t N>
std::uint32_t IndexOf(const std::string_view (&names)[N], std::string_view name) {
  const auto* found = std::find(std::begin(names), std::end(names), name);
  if (found == std::end(names)) {
    throw std::invalid_argument("there is no pass or dtype '" + std::string(name) + "'");
  }
  return static_cast<std::uint32_t>(found - names);
}

}  // namespace

DispatchPlan ExamplePlan(std::string_view pass, std::string_view dtype, std::uint32_t head_dim,
                         const DeviceTraits& traits) {
  AttentionProblem problem;
  problem.pass = static_cast<Pass>(IndexOf({"forward", "tangent", "backward"}, pass));
  problem.dtype = IndexOf({"float32", "float16", "bfloat16"}, dtype);
  if (problem.pass != Pass::kForward) problem.features = FEATURE_DQ | FEATURE_DK | FEATURE_DV;
  if (problem.pass == Pass::kBackward) problem.features |= FEATURE_DOUT;

  AttentionParams& params = problem.params;
  std::fill(std::begin(params.batch), std::end(params.batch), 1);
  params.batch_count = 1;
  params.queries = params.keys = kLength;
  params.query_heads = params.kv_heads = kHeads;
  params.head_dim = head_dim;
  params.window_left = params.window_right = -1;
  params.scale = 1;
  for (const std::uint32_t slot : kDenseOperands) {
    params.operand[slot].row_stride = kHeads * head_dim;
    params.operand[slot].head_stride = head_dim;
    params.operand[slot].column_stride = 1;
  }
  params.operand[OPERAND_LSE].row_stride = kHeads;
  params.operand[OPERAND_LSE].head_stride = 1;
  return PlanAttention(problem, traits);
}

}  // namespace jax_aat
