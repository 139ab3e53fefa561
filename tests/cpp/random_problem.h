// Random problems and devices for the tests of the planner.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <random>
#include <string>
#include <vector>

#include "attention/dispatch_plan.h"
#include "attention/plan_shape.h"

namespace jax_aat {

inline constexpr int kRounds = 5000;
inline constexpr std::uint64_t kGuard = 1u << 31;

inline int round = 0;

inline void Expect(bool condition, const char* what, const char* file, int line) {
  if (condition) return;
  std::fprintf(stderr, "%s:%d: round %d: expected %s\n", file, line, round, what);
  std::exit(1);
}
#define EXPECT(condition) Expect(condition, #condition, __FILE__, __LINE__)

using Random = std::mt19937;

inline std::uint32_t Pick(Random& random, std::initializer_list<std::uint32_t> values) {
  return values.begin()[std::uniform_int_distribution<std::size_t>(0, values.size() - 1)(random)];
}

inline bool Chance(Random& random) { return Pick(random, {0, 1}) == 1; }

inline DeviceTraits RandomTraits(Random& random) {
  DeviceTraits traits;
  traits.subgroup_size = traits.min_subgroup_size = Pick(random, {8, 16, 32, 64});
  traits.max_subgroup_size = Chance(random) ? traits.min_subgroup_size : 64;
  traits.max_shared_memory = Pick(random, {16384, 32768, 49152, 65536});
  traits.max_workgroup_invocations = Pick(random, {128, 256, 1024});
  traits.max_workgroup_count = Pick(random, {1024, 65535});
  traits.storage_16bit = true;
  traits.coopmat_float16 = traits.coopmat_bfloat16 =
      traits.min_subgroup_size == 32 && Chance(random);
  traits.coopmat_layout_known = traits.coopmat_float16 && Chance(random);
  traits.coopmat_relays = traits.coopmat_float16 && !traits.coopmat_layout_known && Chance(random);
  return traits;
}

// Dense strides of an operand: batch axes with the extents given (1: broadcast), then rows, heads
// and columns in the order of `axes`.
struct Axis {
  std::uint32_t extent;
  std::uint32_t OperandLayout::*stride;
};

inline void SetLayout(Random& random, AttentionParams& params, int slot, std::vector<Axis> axes,
                      bool may_broadcast) {
  OperandLayout& layout = params.operand[slot];
  std::uint32_t stride = 1;
  for (auto axis = axes.rbegin(); axis != axes.rend(); ++axis) {
    const bool broadcast = may_broadcast && Chance(random);
    layout.*(axis->stride) = broadcast || axis->extent == 1 ? 0 : stride;
    if (!broadcast) stride *= axis->extent;
  }
  for (int axis = MAX_BATCH_AXES - 1; axis >= 0; --axis) {
    const bool broadcast = params.batch[axis] == 1 || Chance(random);
    layout.batch_stride[axis] = broadcast ? 0 : stride;
    if (!broadcast) stride *= params.batch[axis];
  }
}

// Makes the call adaptive.
inline void AddRandomPlan(Random& random, AttentionProblem& problem) {
  AttentionParams& params = problem.params;
  SetPlanShape(params, Pick(random, {16, 32, 64, 128, 256}), Pick(random, {256, 512, 1024}),
               Pick(random, {4, 1000}), Pick(random, {1, 1000}));
  problem.features &= ~FEATURE_DBIAS;
  problem.features |= FEATURE_PLAN;
  for (const std::uint32_t feature : {FEATURE_LEVEL_BIAS, FEATURE_DCOARSE_K, FEATURE_DCOARSE_V,
                                      FEATURE_DLEVEL_BIAS, FEATURE_DSHARES}) {
    if (Chance(random)) problem.features |= feature;
  }
  const Axis rows = {params.coarse_rows, &OperandLayout::row_stride};
  const Axis heads = {params.kv_heads, &OperandLayout::head_stride};
  const Axis columns = {params.head_dim, &OperandLayout::column_stride};
  for (const int slot :
       {OPERAND_COARSE_K, OPERAND_COARSE_V, OPERAND_DCOARSE_K, OPERAND_DCOARSE_V}) {
    SetLayout(random, params, slot, {rows, heads, columns}, false);
  }
}

inline AttentionProblem RandomProblem(Random& random) {
  AttentionProblem problem;
  problem.pass = static_cast<Pass>(Pick(random, {0, 1, 2}));
  problem.dtype = Pick(random, {DTYPE_F32, DTYPE_F16, DTYPE_BF16});
  problem.bias_dtype = Pick(random, {DTYPE_F32, DTYPE_F16, DTYPE_BF16});
  AttentionParams& params = problem.params;
  params.batch_count = 1;
  for (std::uint32_t& extent : params.batch) {
    extent = Pick(random, {1, 1, 2, 3});
    params.batch_count *= extent;
  }
  params.queries = Pick(random, {1, 2, 15, 16, 17, 63, 64, 100, 1000, 5000});
  params.keys = Pick(random, {1, 2, 15, 16, 17, 63, 64, 100, 1000, 5000});
  params.kv_heads = Pick(random, {1, 2, 3});
  params.query_heads = params.kv_heads * Pick(random, {1, 2, 3, 4, 8, 12, 16, 32, 40});
  params.head_dim = Pick(random, {1, 5, 16, 32, 33, 64, 80, 128, 129, 192, 250, 256});
  params.window_left = static_cast<int>(Pick(random, {0, 1, 10, 30, 6000})) - 1;
  params.window_right = static_cast<int>(Pick(random, {0, 1, 10, 30, 6000})) - 1;
  params.scale = 1;
  params.soft_cap = 3;
  problem.features = random() & 0x3fff;

  const Axis queries = {params.queries, &OperandLayout::row_stride};
  const Axis keys = {params.keys, &OperandLayout::row_stride};
  const Axis query_heads = {params.query_heads, &OperandLayout::head_stride};
  const Axis kv_heads = {params.kv_heads, &OperandLayout::head_stride};
  const Axis columns = {params.head_dim, &OperandLayout::column_stride};
  const Axis key_columns = {params.keys, &OperandLayout::column_stride};
  for (const int slot : {OPERAND_Q, OPERAND_OUT, OPERAND_DQ, OPERAND_DOUT}) {
    SetLayout(random, params, slot, {queries, query_heads, columns}, false);
  }
  for (const int slot : {OPERAND_K, OPERAND_V, OPERAND_DK, OPERAND_DV}) {
    SetLayout(random, params, slot, {keys, kv_heads, columns}, false);
  }
  for (const int slot : {OPERAND_BIAS, OPERAND_MASK, OPERAND_DBIAS}) {
    SetLayout(random, params, slot, {query_heads, queries, key_columns}, true);
  }
  for (const int slot : {OPERAND_LSE, OPERAND_DLSE}) {
    SetLayout(random, params, slot, {queries, query_heads}, false);
  }
  SetLayout(random, params, OPERAND_Q_LENGTHS, {}, false);
  SetLayout(random, params, OPERAND_KV_LENGTHS, {}, false);
  SetLayout(random, params, OPERAND_Q_SEGMENTS, {queries}, false);
  SetLayout(random, params, OPERAND_KV_SEGMENTS, {keys}, false);

  if (Chance(random)) AddRandomPlan(random, problem);

  const OperandLayout& dbias = params.operand[OPERAND_DBIAS];
  for (int axis = 0; axis < MAX_BATCH_AXES; ++axis) {
    problem.dbias_extent[axis] = dbias.batch_stride[axis] ? params.batch[axis] : 1;
  }
  problem.dbias_extent[MAX_BATCH_AXES] = dbias.head_stride ? params.query_heads : 1;
  problem.dbias_extent[MAX_BATCH_AXES + 1] = dbias.row_stride ? params.queries : 1;
  problem.dbias_extent[MAX_BATCH_AXES + 2] = dbias.column_stride ? params.keys : 1;
  return problem;
}

inline std::uint64_t DivideUp(std::uint64_t value, std::uint64_t divisor) {
  return (value + divisor - 1) / divisor;
}

inline bool StartsWith(const std::string& text, const char* prefix) {
  return text.rfind(prefix, 0) == 0;
}

}  // namespace jax_aat
