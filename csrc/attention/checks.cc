#include "attention/checks.h"

#include <stdexcept>
#include <string>

#include "attention/plan_shape.h"

namespace jax_aat {
namespace {

constexpr std::uint32_t kMaxHeadDim = 256;
constexpr std::uint32_t kMaxRows = 1u << 30;

void Require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

// One head's rows and one group of heads must be indexable.
void CheckSlice(const AttentionProblem& problem, int slot, std::uint64_t rows, std::uint64_t heads,
                std::uint64_t columns, const char* name) {
  const OperandLayout& layout = problem.params.operand[slot];
  CheckIndex((rows - 1) * layout.row_stride + (heads - 1) * layout.head_stride +
                 (columns - 1) * layout.column_stride + 4,
             name);
}

// Of a call that makes a plan.
void CheckPlanning(const AttentionProblem& problem) {
  const AttentionParams& params = problem.params;
  CheckIndex(std::uint64_t{params.plan_tiles} * Granules(params), "prices");
  Require(params.level_count >= 1 && params.level_count <= 3,
          "a plan has 1 to 3 levels; got " + std::to_string(params.level_count));
  const std::uint32_t key_tiles = KeyTiles(params);
  Require((problem.features & FEATURE_PRICES) ||
              (params.judged_key_tiles >= 1 && params.judged_key_tiles <= key_tiles),
          "a tile looks into 1 to all of the " + std::to_string(key_tiles) + " key tiles; got " +
              std::to_string(params.judged_key_tiles));
  Require(!(problem.features & (FEATURE_MASK | FEATURE_BIAS)),
          "plans for a mask or a bias are not made by shaders: use implementation='xla'");
}

void CheckPlan(const AttentionProblem& problem) {
  const AttentionParams& params = problem.params;
  for (const int slot :
       {OPERAND_COARSE_K, OPERAND_COARSE_V, OPERAND_DCOARSE_K, OPERAND_DCOARSE_V}) {
    CheckSlice(problem, slot, params.coarse_rows, 1, params.head_dim, "coarse rows");
    Require(params.operand[slot].column_stride <= 1,
            "rows along head_dim must be contiguous in memory");
  }
  for (const int slot :
       {OPERAND_LEVEL_BIAS, OPERAND_SHARES, OPERAND_DLEVEL_BIAS, OPERAND_DSHARES}) {
    CheckSlice(problem, slot, params.queries, params.query_heads / params.kv_heads, 2, "shares");
  }
  CheckIndex(std::uint64_t{params.plan_tiles} * LevelWords(params), "levels");
  if (problem.pass == Pass::kPlan || (problem.features & FEATURE_MAKES_LISTS)) {
    CheckPlanning(problem);
  }
  CheckIndex(params.list_capacity, "work lists");
  CheckIndex(params.key_list_capacity, "transposed work lists");
}

}  // namespace

void CheckIndex(std::uint64_t elements, const char* what) {
  Require(elements < (std::uint64_t{1} << 31),
          std::string("the ") + what + " of one call span " + std::to_string(elements) +
              " elements, more than the shaders can index (2^31): split the sequence");
}

std::uint32_t CheckedStride(std::uint64_t stride) {
  Require(stride <= UINT32_MAX, "a batch axis has a stride of " + std::to_string(stride) +
                                    " elements, more than 2^32 - 1: split the batch");
  return static_cast<std::uint32_t>(stride);
}

void CheckProblem(const AttentionProblem& problem, const DeviceTraits& traits) {
  const AttentionParams& params = problem.params;
  std::uint64_t batch_count = 1;
  for (const std::uint32_t extent : params.batch) batch_count *= extent;
  Require(batch_count == params.batch_count && batch_count > 0,
          "batch_count is " + std::to_string(params.batch_count) + ", the batch axes hold " +
              std::to_string(batch_count) + " entries");
  Require(params.queries > 0 && params.keys > 0 && params.queries <= kMaxRows &&
              params.keys <= kMaxRows,
          "sequence lengths must be 1 to 2^30; got " + std::to_string(params.queries) +
              " queries and " + std::to_string(params.keys) + " keys");
  Require(
      params.kv_heads > 0 && params.query_heads > 0 && params.query_heads % params.kv_heads == 0,
      "the number of query heads (" + std::to_string(params.query_heads) +
          ") must be a multiple of that of key/value heads (" + std::to_string(params.kv_heads) +
          ")");
  Require(params.head_dim > 0 && params.head_dim <= kMaxHeadDim,
          "head_dim must be 1 to 256; got " + std::to_string(params.head_dim));
  Require(problem.dtype <= DTYPE_BF16 && problem.bias_dtype <= DTYPE_BF16,
          "dtypes must be float32, float16 or bfloat16");
  const bool writes_16_bits = problem.dtype != DTYPE_F32 || (problem.pass == Pass::kBackward &&
                                                             (problem.features & FEATURE_DBIAS) &&
                                                             problem.bias_dtype != DTYPE_F32);
  Require(traits.storage_16bit || !writes_16_bits,
          "the device cannot store 16-bit elements: use float32");
  Require(!(problem.features & FEATURE_SOFT_CAP) || params.soft_cap > 0,
          "logits_soft_cap must be positive");

  const std::uint64_t group = params.query_heads / params.kv_heads;
  for (const int slot : {OPERAND_Q, OPERAND_OUT, OPERAND_DQ, OPERAND_DOUT}) {
    CheckSlice(problem, slot, params.queries, group, params.head_dim, "queries");
  }
  for (const int slot : {OPERAND_K, OPERAND_V, OPERAND_DK, OPERAND_DV}) {
    CheckSlice(problem, slot, params.keys, 1, params.head_dim, "keys or values");
  }
  for (const int slot : {OPERAND_Q, OPERAND_K, OPERAND_V, OPERAND_OUT, OPERAND_DQ, OPERAND_DK,
                         OPERAND_DV, OPERAND_DOUT}) {
    Require(params.operand[slot].column_stride <= 1,
            "rows along head_dim must be contiguous in memory");
  }
  if (problem.features & FEATURE_PLAN) CheckPlan(problem);
  CheckSlice(problem, OPERAND_LSE, params.queries, group, 1, "rows of logsumexp");
  CheckSlice(problem, OPERAND_BIAS, params.queries, group, params.keys, "biases");
  CheckSlice(problem, OPERAND_DBIAS, params.queries, group, params.keys, "biases");
  CheckSlice(problem, OPERAND_MASK, params.queries, group, params.keys, "masks");
}

}  // namespace jax_aat
