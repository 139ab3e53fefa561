#include "attention/example_plan.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>

#include "attention/plan_shape.h"

namespace jax_aat {
namespace {

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

AttentionProblem ExampleProblem(const ExampleCall& call) {
  AttentionProblem problem;
  problem.pass = static_cast<Pass>(IndexOf({"forward", "tangent", "backward", "plan"}, call.pass));
  problem.dtype = IndexOf(kDtypeNames, call.dtype);
  const auto set = [&](std::uint32_t features) { problem.features |= features; };
  const bool is_backward = problem.pass == Pass::kBackward, is_plan = problem.pass == Pass::kPlan;
  if (is_backward || problem.pass == Pass::kTangent) set(FEATURE_DQ | FEATURE_DK | FEATURE_DV);
  if (is_backward) set(FEATURE_DOUT);
  if (call.causal) set(FEATURE_CAUSAL);

  AttentionParams& params = problem.params;
  std::fill(std::begin(params.batch), std::end(params.batch), 1);
  params.batch[MAX_BATCH_AXES - 1] = params.batch_count = call.batch;
  params.queries = call.queries;
  params.keys = call.keys;
  params.query_heads = call.query_heads;
  params.kv_heads = call.kv_heads;
  params.head_dim = call.head_dim;
  params.window_left = params.window_right = -1;
  params.scale = 1;
  for (const std::uint32_t slot : kDenseOperands) {
    const bool of_keys =
        slot == OPERAND_K || slot == OPERAND_V || slot == OPERAND_DK || slot == OPERAND_DV;
    OperandLayout& layout = params.operand[slot];
    layout.row_stride = (of_keys ? call.kv_heads : call.query_heads) * call.head_dim;
    layout.head_stride = call.head_dim;
    layout.column_stride = 1;
    layout.batch_stride[MAX_BATCH_AXES - 1] =
        call.batch == 1 ? 0 : (of_keys ? call.keys : call.queries) * layout.row_stride;
  }
  params.operand[OPERAND_LSE].row_stride = call.query_heads;
  params.operand[OPERAND_LSE].head_stride = 1;

  if (call.query_tile > 0) {
    SetPlanShape(params, call.query_tile, call.super_tile, call.list_capacity, 0);
    problem.keeps_levels = problem.keeps_lists = call.list_capacity == 0;
    params.level_count = call.level_count;
    params.candidate_share = call.candidate_share;
    params.judged_key_tiles = call.judged_key_tiles;
    set(FEATURE_PLAN);
    if (!is_plan) set(FEATURE_MAKES_MEANS);
    if (!is_plan && call.corrects) set(FEATURE_CORRECTS | FEATURE_LEVEL_BIAS);
    // As of a plan: what nobody reads is no result.
    if (problem.pass == Pass::kForward && problem.keeps_levels) set(FEATURE_SHARES);
    const bool may_plan = is_plan || problem.pass == Pass::kForward;
    if (may_plan && call.level_count > 0) set(FEATURE_MAKES_LISTS | FEATURE_SPARE_ROWS);
    if (is_backward) set(FEATURE_DCOARSE_K | FEATURE_DCOARSE_V);
    if (is_backward && call.corrects) set(FEATURE_DSHARES | FEATURE_DLEVEL_BIAS);
  }
  return problem;
}

DispatchPlan ExamplePlan(const ExampleCall& call, const DeviceTraits& traits) {
  return PlanAttention(ExampleProblem(call), traits);
}

}  // namespace jax_aat
