#include "attention/traffic.h"

#include <initializer_list>
#include <limits>
#include <span>
#include <string_view>

#include "attention/plan_builder.h"

namespace jax_aat {
namespace {

struct Kernel {
  std::string_view shader;  // without dtype and _coopmat
  std::initializer_list<std::uint32_t> slots;
};

#define JAX_AAT_ROWS OPERAND_Q, OPERAND_K, OPERAND_V
#define JAX_AAT_COARSE OPERAND_COARSE_K, OPERAND_COARSE_V, OPERAND_LEVEL_BIAS
#define JAX_AAT_MASKS                                                                    \
  OPERAND_BIAS, OPERAND_MASK, OPERAND_Q_LENGTHS, OPERAND_KV_LENGTHS, OPERAND_Q_SEGMENTS, \
      OPERAND_KV_SEGMENTS
#define JAX_AAT_BACKWARD OPERAND_LSE, OPERAND_DOUT, OPERAND_DELTA, OPERAND_DSHARES

const Kernel kKernels[] = {
    {"attend_forward",
     {JAX_AAT_ROWS, JAX_AAT_COARSE, JAX_AAT_MASKS, OPERAND_OUT, OPERAND_LSE, OPERAND_SHARES,
      OPERAND_ROW_COUNTS, OPERAND_RECORDS}},
    {"merge_parts", {OPERAND_RECORDS, OPERAND_OUT, OPERAND_LSE, OPERAND_SHARES}},
    {"attend_tangent",
     {JAX_AAT_ROWS, JAX_AAT_COARSE, JAX_AAT_MASKS, OPERAND_OUT, OPERAND_LSE, OPERAND_SHARES,
      OPERAND_DQ, OPERAND_DK, OPERAND_DV, OPERAND_DBIAS, OPERAND_DCOARSE_K, OPERAND_DCOARSE_V,
      OPERAND_DLEVEL_BIAS, OPERAND_DOUT, OPERAND_DLSE, OPERAND_DSHARES}},
    {"attend_backward_delta",
     {OPERAND_OUT, OPERAND_DOUT, OPERAND_DLSE, OPERAND_SHARES, OPERAND_DSHARES, OPERAND_DELTA}},
    {"attend_backward_dq",
     {JAX_AAT_ROWS, JAX_AAT_COARSE, JAX_AAT_MASKS, JAX_AAT_BACKWARD, OPERAND_DQ,
      OPERAND_DLEVEL_BIAS}},
    {"attend_backward_dq_stored", {OPERAND_SCORE_GRADIENTS, OPERAND_K, OPERAND_DQ}},
    {"attend_backward_dkv",
     {JAX_AAT_ROWS, JAX_AAT_MASKS, JAX_AAT_BACKWARD, OPERAND_DK, OPERAND_DV,
      OPERAND_SCORE_GRADIENTS}},
    {"attend_backward_dbias",
     {JAX_AAT_ROWS, JAX_AAT_COARSE, JAX_AAT_MASKS, JAX_AAT_BACKWARD, OPERAND_DBIAS}},
    {"tile_processor", {OPERAND_K, OPERAND_V, OPERAND_KEY_SUMMARIES}},
    {"cross_tile_router", {OPERAND_Q, OPERAND_KEY_SUMMARIES, OPERAND_PRICES}},
    {"coarse_rows", {OPERAND_K, OPERAND_V, OPERAND_COARSE_K, OPERAND_COARSE_V}},
    {"state_covariance", {OPERAND_K, OPERAND_V, OPERAND_STATE}},
    {"state_prefix", {OPERAND_STATE}},
    {"state_level_bias", {OPERAND_Q, OPERAND_STATE, OPERAND_LEVEL_BIAS}},
    {"state_correction", {OPERAND_Q, OPERAND_SHARES, OPERAND_STATE, OPERAND_OUT}},
    {"state_cotangents", {OPERAND_Q, OPERAND_DOUT, OPERAND_STATE, OPERAND_DSHARES}},
    {"state_covariance_gradient", {OPERAND_Q, OPERAND_DOUT, OPERAND_SHARES, OPERAND_DSTATE}},
    {"state_query_gradient",
     {OPERAND_Q, OPERAND_DOUT, OPERAND_SHARES, OPERAND_LEVEL_BIAS, OPERAND_DLEVEL_BIAS,
      OPERAND_STATE, OPERAND_DQ}},
    {"state_variance_gradient",
     {OPERAND_Q, OPERAND_LEVEL_BIAS, OPERAND_DLEVEL_BIAS, OPERAND_SHARES, OPERAND_DSHARES,
      OPERAND_DSTATE}},
    {"state_suffix", {OPERAND_DSTATE}},
    {"sum_parts", {OPERAND_DCOARSE_K, OPERAND_DCOARSE_V}},
    {"key_gradients",
     {OPERAND_K, OPERAND_V, OPERAND_DCOARSE_K, OPERAND_DCOARSE_V, OPERAND_DSTATE, OPERAND_DK,
      OPERAND_DV}},
};

// Of a pass over coarse rows, in place of those of keys.
constexpr std::uint32_t kCoarseTileSlots[] = {
    OPERAND_Q, JAX_AAT_COARSE, JAX_AAT_BACKWARD, OPERAND_DCOARSE_K, OPERAND_DCOARSE_V,
};

std::string_view Family(std::string_view shader) {
  shader = shader.substr(0, shader.rfind('.'));
  constexpr std::string_view kSuffix = "_coopmat";
  if (shader.ends_with(kSuffix)) shader.remove_suffix(kSuffix.size());
  return shader;
}

std::span<const std::uint32_t> SlotsOf(const Dispatch& dispatch) {
  if (dispatch.specialization[kFeatures] & FEATURE_CAREFUL) return {};
  if (dispatch.key_rows == KeyRows::kCoarse) return kCoarseTileSlots;
  const std::string_view family = Family(dispatch.shader);
  for (const Kernel& kernel : kKernels) {
    if (kernel.shader == family) return {kernel.slots.begin(), kernel.slots.size()};
  }
  return {};
}

// Of the passes that are specialised for shares, if they have any.
bool IsBackward(const Dispatch& dispatch) {
  return dispatch.shader.starts_with("attend_backward_");
}

// Without which a kernel of dk and dv leaves a slot alone, as gradients of keys, or coarse rows,
// and of their values may be made by a kernel each; 0: it never does.
std::uint32_t FeatureOf(std::uint32_t slot) {
  switch (slot) {
    case OPERAND_DK:
    case OPERAND_DCOARSE_K:
    case OPERAND_DELTA:
      return FEATURE_DK;
    case OPERAND_DV:
    case OPERAND_DCOARSE_V:
      return FEATURE_DV;
    case OPERAND_SCORE_GRADIENTS:
      return FEATURE_SCORE_GRADIENTS;
    default:
      return 0;
  }
}

std::uint64_t ScratchBytes(const DispatchPlan& plan, std::uint32_t slot) {
  for (const DispatchPlan::Scratch& part : plan.scratch) {
    if (part.operand == slot) return part.bytes;
  }
  return 0;
}

}  // namespace

double Traffic(const DispatchPlan& plan, const Dispatch& dispatch, const OperandBytes& operands) {
  const std::span<const std::uint32_t> slots = SlotsOf(dispatch);
  if (slots.empty()) return std::numeric_limits<double>::quiet_NaN();
  const std::uint32_t features = dispatch.specialization[kFeatures];
  const bool leaves_records =
      Family(dispatch.shader) == "attend_forward" && ScratchBytes(plan, OPERAND_RECORDS) > 0;
  std::uint64_t bytes = 0;
  for (const std::uint32_t slot : slots) {
    // Workgroups that share lists leave records of these, which another kernel merges.
    const bool is_merged = slot == OPERAND_OUT || slot == OPERAND_LSE || slot == OPERAND_SHARES;
    if (is_merged && leaves_records) continue;
    const bool of_shares = slot == OPERAND_SHARES || slot == OPERAND_DSHARES;
    if (of_shares && IsBackward(dispatch) && !(features & FEATURE_DSHARES)) continue;
    const bool of_keys = Family(dispatch.shader) == "attend_backward_dkv";
    const std::uint32_t needed = of_keys ? FeatureOf(slot) : 0;
    if ((features & needed) != needed) continue;
    bytes += operands[slot] + ScratchBytes(plan, slot);
  }
  // Attention on matrices may correct its results itself.
  const bool corrects =
      Family(dispatch.shader) == "attend_forward" && (features & FEATURE_CORRECTS) != 0;
  if (corrects) bytes += ScratchBytes(plan, OPERAND_STATE);
  return static_cast<double>(bytes) * dispatch.share;
}

}  // namespace jax_aat
