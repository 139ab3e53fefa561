// Fuzzes the planner: whatever the problem and the device, a plan must be bounded, its scratch
// disjoint, its grids complete and its work lists told apart where masks differ.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "attention/dispatch_plan.h"

namespace jax_aat {
namespace {

constexpr int kRounds = 5000;
constexpr std::uint64_t kGuard = 1u << 31;

int round = 0;

void Expect(bool condition, const char* what, int line) {
  if (condition) return;
  std::fprintf(stderr, "planner_test.cc:%d: round %d: expected %s\n", line, round, what);
  std::exit(1);
}
#define EXPECT(condition) Expect(condition, #condition, __LINE__)

using Random = std::mt19937;

std::uint32_t Pick(Random& random, std::initializer_list<std::uint32_t> values) {
  return values.begin()[std::uniform_int_distribution<std::size_t>(0, values.size() - 1)(random)];
}

bool Chance(Random& random) { return Pick(random, {0, 1}) == 1; }

DeviceTraits RandomTraits(Random& random) {
  DeviceTraits traits;
  traits.subgroup_size = traits.min_subgroup_size = Pick(random, {8, 16, 32, 64});
  traits.max_subgroup_size = Chance(random) ? traits.min_subgroup_size : 64;
  traits.max_shared_memory = Pick(random, {16384, 32768, 49152, 65536});
  traits.max_workgroup_invocations = Pick(random, {128, 256, 1024});
  traits.max_workgroup_count = Pick(random, {1024, 65535});
  traits.storage_16bit = true;
  traits.coopmat_float16 = traits.coopmat_bfloat16 = traits.coopmat_layout_known =
      traits.min_subgroup_size == 32 && Chance(random);
  return traits;
}

// Dense strides of an operand: batch axes with the extents given (1: broadcast), then rows, heads
// and columns in the order of `axes`.
struct Axis {
  std::uint32_t extent;
  std::uint32_t OperandLayout::*stride;
};

void SetLayout(Random& random, AttentionParams& params, int slot, std::vector<Axis> axes,
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

AttentionProblem RandomProblem(Random& random) {
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

  const OperandLayout& dbias = params.operand[OPERAND_DBIAS];
  for (int axis = 0; axis < MAX_BATCH_AXES; ++axis) {
    problem.dbias_extent[axis] = dbias.batch_stride[axis] ? params.batch[axis] : 1;
  }
  problem.dbias_extent[MAX_BATCH_AXES] = dbias.head_stride ? params.query_heads : 1;
  problem.dbias_extent[MAX_BATCH_AXES + 1] = dbias.row_stride ? params.queries : 1;
  problem.dbias_extent[MAX_BATCH_AXES + 2] = dbias.column_stride ? params.keys : 1;
  return problem;
}

std::uint64_t DivideUp(std::uint64_t value, std::uint64_t divisor) {
  return (value + divisor - 1) / divisor;
}

bool StartsWith(const std::string& text, const char* prefix) { return text.rfind(prefix, 0) == 0; }

// Number of workgroups that a dispatch needs, from its specialisation alone.
std::uint64_t Workgroups(const AttentionProblem& problem, const Dispatch& dispatch,
                         std::uint64_t query_lists, std::uint64_t key_lists) {
  const AttentionParams& params = problem.params;
  if (StartsWith(dispatch.shader, "attend_backward_delta")) {
    const std::uint64_t rows =
        std::uint64_t{params.queries} * params.query_heads * params.batch_count;
    return DivideUp(rows, dispatch.specialization[0] / 8);
  }
  const std::uint64_t tile_rows = dispatch.specialization[4];
  const std::uint64_t heads = dispatch.specialization[5];
  const std::uint64_t query_tiles = DivideUp(params.queries, tile_rows / heads);
  const std::uint64_t key_tiles = DivideUp(params.keys, tile_rows);
  if (StartsWith(dispatch.shader, "work_lists")) {
    return dispatch.specialization[11] ? key_lists * key_tiles : query_lists * query_tiles;
  }
  if (StartsWith(dispatch.shader, "attend_backward_dkv")) {
    return key_tiles * params.kv_heads * params.batch_count;
  }
  if (StartsWith(dispatch.shader, "attend_backward_dbias")) {
    std::uint64_t tiles = 1;
    for (int axis = 0; axis <= MAX_BATCH_AXES; ++axis) tiles *= problem.dbias_extent[axis];
    return tiles * DivideUp(problem.dbias_extent[MAX_BATCH_AXES + 1], tile_rows) *
           DivideUp(problem.dbias_extent[MAX_BATCH_AXES + 2], dispatch.specialization[6]);
  }
  return query_tiles * (params.query_heads / heads) * params.batch_count;
}

struct Lists {
  std::uint64_t query = 0;
  std::uint64_t key = 0;
};

// Checks that batch entries and heads share a list only where no operand that hides keys tells them
// apart; answers with the number of lists.
Lists CheckLists(const AttentionProblem& problem, const AttentionParams& params,
                 std::uint32_t heads_a_chunk) {
  constexpr std::pair<int, std::uint32_t> kHiding[] = {{OPERAND_MASK, FEATURE_MASK},
                                                       {OPERAND_Q_LENGTHS, FEATURE_Q_LENGTHS},
                                                       {OPERAND_KV_LENGTHS, FEATURE_KV_LENGTHS},
                                                       {OPERAND_Q_SEGMENTS, FEATURE_SEGMENTS},
                                                       {OPERAND_KV_SEGMENTS, FEATURE_SEGMENTS}};
  std::set<std::uint64_t> batch_lists, query_lists, key_lists, kinds;
  for (std::uint32_t entry = 0; entry < params.batch_count; ++entry) {
    std::uint64_t list = 0, kind = 0, rest = entry;
    for (int axis = MAX_BATCH_AXES - 1; axis >= 0; --axis) {
      const std::uint64_t index = rest % params.batch[axis];
      rest /= params.batch[axis];
      list += index * params.list_batch_stride[axis];
      bool differs = false;
      for (const auto& [slot, feature] : kHiding) {
        differs |= (problem.features & feature) && params.operand[slot].batch_stride[axis] != 0;
      }
      kind = kind * 16 + (differs ? index : 0);
    }
    batch_lists.insert(list);
    kinds.insert(kind);
    for (std::uint32_t chunk = 0; chunk < params.query_heads / heads_a_chunk; ++chunk) {
      query_lists.insert(list + std::uint64_t{chunk} * params.list_head_stride);
    }
    for (std::uint32_t head = 0; head < params.kv_heads; ++head) {
      key_lists.insert(list + std::uint64_t{head} * params.key_list_head_stride);
    }
  }
  EXPECT(batch_lists.size() == kinds.size());
  EXPECT(*query_lists.rbegin() == query_lists.size() - 1);
  EXPECT(*key_lists.rbegin() == key_lists.size() - 1);
  return {query_lists.size(), key_lists.size()};
}

void CheckScratch(const AttentionProblem& problem, const DispatchPlan& plan) {
  const AttentionParams& params = plan.params;
  std::set<std::uint32_t> slots;
  for (std::size_t i = 0; i < plan.scratch.size(); ++i) {
    const auto& [slot, offset] = plan.scratch[i];
    const std::uint64_t end =
        i + 1 < plan.scratch.size() ? plan.scratch[i + 1].offset : plan.scratch_bytes;
    EXPECT(slots.insert(slot).second);
    EXPECT(offset % 256 == 0 && offset < end);
    std::uint64_t words;
    if (slot == OPERAND_DELTA) {
      words = std::uint64_t{params.queries} * params.query_heads * params.batch_count;
    } else {
      const std::uint64_t capacity =
          slot == OPERAND_LISTS ? params.list_capacity : params.key_list_capacity;
      const std::uint64_t headers = params.operand[slot].row_stride;  // in words
      EXPECT(headers % 4 == 0 && headers > 0);
      words = headers + headers / 4 * capacity;
    }
    EXPECT(words < kGuard);
    EXPECT(words * 4 <= end - offset);
  }
  const bool backward = problem.pass == Pass::kBackward;
  if (!backward || (problem.features & FEATURE_DQ)) EXPECT(slots.count(OPERAND_LISTS) == 1);
  if (backward && (problem.features & (FEATURE_DK | FEATURE_DV))) {
    EXPECT(slots.count(OPERAND_KEY_LISTS) == 1);
  }
}

void CheckDispatches(const AttentionProblem& problem, const DeviceTraits& traits,
                     const DispatchPlan& plan) {
  EXPECT(plan.dispatches.size() <= 6);
  int barriers = 0, kernels = 0;
  Lists lists;
  for (const Dispatch& dispatch : plan.dispatches) {
    if (StartsWith(dispatch.shader, "work_lists")) {
      lists = CheckLists(problem, plan.params, dispatch.specialization[5]);
    }
  }
  for (const Dispatch& dispatch : plan.dispatches) {
    const auto& constants = dispatch.specialization;
    EXPECT(constants.size() == 12);
    EXPECT(constants[0] <= traits.max_workgroup_invocations);
    const std::uint64_t x = dispatch.groups[0], y = dispatch.groups[1];
    EXPECT(x <= traits.max_workgroup_count && y <= traits.max_workgroup_count);
    EXPECT(dispatch.groups[2] == 1);
    const std::uint64_t needed = Workgroups(problem, dispatch, lists.query, lists.key);
    EXPECT(x * y >= needed && x * (y - 1) < needed);
    const bool prepares = StartsWith(dispatch.shader, "work_lists") ||
                          StartsWith(dispatch.shader, "attend_backward_delta");
    EXPECT(!(prepares && kernels > 0));
    // The first kernel waits for all that was prepared, a careful pass for the pass that it mends;
    // the others need not wait for each other.
    const bool careful = (constants[2] & FEATURE_CAREFUL) != 0;
    EXPECT(dispatch.barrier_before == (careful || (!prepares && kernels == 0)));
    barriers += dispatch.barrier_before;
    if (prepares) continue;
    ++kernels;
    if (careful) {
      EXPECT(StartsWith(dispatch.shader, "attend_forward_coopmat") && kernels == 2);
      EXPECT(dispatch.flops == 0);
      continue;
    }
    EXPECT(constants[6] % 16 == 0 && constants[4] % constants[5] == 0);
    EXPECT(dispatch.flops > 0 || plan.params.window_left >= 0 || plan.params.window_right >= 0);
    if (std::strcmp(plan.path, "portable") == 0) {
      EXPECT(constants[0] == constants[4] / constants[8] * 8 && constants[0] >= constants[4]);
    }
  }
  const bool mends = std::strcmp(plan.path, "coopmat") == 0 && problem.pass == Pass::kForward;
  EXPECT(mends ? barriers == 2 : barriers <= 1);
}

bool Visible(const AttentionProblem& problem, std::int64_t t, std::int64_t s) {
  const AttentionParams& params = problem.params;
  if ((problem.features & FEATURE_CAUSAL) && s > t) return false;
  if (!(problem.features & FEATURE_WINDOW)) return true;
  return (params.window_left < 0 || s >= t - params.window_left) &&
         (params.window_right < 0 || s <= t + params.window_right);
}

// No tile sees more granules than its list can hold.
void CheckCapacity(const AttentionProblem& problem, const DispatchPlan& plan) {
  const AttentionParams& params = plan.params;
  for (const Dispatch& dispatch : plan.dispatches) {
    if (!StartsWith(dispatch.shader, "work_lists")) continue;
    const bool transposed = dispatch.specialization[11] != 0;
    const std::uint32_t heads = dispatch.specialization[5];
    const std::uint32_t tile_rows = dispatch.specialization[4] / (transposed ? 1 : heads);
    const std::uint32_t granule_rows = 16 / (transposed ? heads : 1);
    std::map<std::uint32_t, std::set<std::uint32_t>> granules;
    for (std::uint32_t t = 0; t < params.queries; ++t) {
      for (std::uint32_t s = 0; s < params.keys; ++s) {
        if (!Visible(problem, t, s)) continue;
        const std::uint32_t tile = (transposed ? s : t) / tile_rows;
        granules[tile].insert((transposed ? t : s) / granule_rows);
      }
    }
    for (const auto& [tile, seen] : granules) {
      EXPECT(seen.size() <= (transposed ? params.key_list_capacity : params.list_capacity));
    }
  }
}

// Products of the forward pass, pair by pair.
double CountedFlops(const AttentionProblem& problem) {
  const AttentionParams& params = problem.params;
  double pairs = 0;
  for (std::int64_t t = 0; t < params.queries; ++t) {
    for (std::int64_t s = 0; s < params.keys; ++s) {
      pairs += Visible(problem, t, s);
    }
  }
  return 4.0 * pairs * params.head_dim * params.query_heads * params.batch_count;
}

void Fuzz() {
  Random random(1);
  for (round = 0; round < kRounds; ++round) {
    const AttentionProblem problem = RandomProblem(random);
    const DeviceTraits traits = RandomTraits(random);
    DispatchPlan plan;
    try {
      plan = PlanAttention(problem, traits);
    } catch (const std::invalid_argument& error) {
      // Only calls too large for the grid or for 31-bit indices may be refused.
      const std::string message = error.what();
      EXPECT(message.find("split") != std::string::npos);
      continue;
    }
    CheckDispatches(problem, traits, plan);
    CheckScratch(problem, plan);
    if (std::uint64_t{problem.params.queries} * problem.params.keys <= 10000) {
      CheckCapacity(problem, plan);
      if (problem.pass == Pass::kForward) {
        EXPECT(plan.dispatches[1].flops == CountedFlops(problem));
      }
    }
  }
}

void ExpectRefusal(AttentionProblem problem, DeviceTraits traits, const char* word) {
  try {
    PlanAttention(problem, traits);
  } catch (const std::invalid_argument& error) {
    if (std::string(error.what()).find(word) != std::string::npos) return;
    std::fprintf(stderr, "the refusal says \"%s\", not \"%s\"\n", error.what(), word);
    std::exit(1);
  }
  std::fprintf(stderr, "nothing was refused where \"%s\" was expected\n", word);
  std::exit(1);
}

void Refusals() {
  Random random(2);
  AttentionProblem good;
  DeviceTraits traits;
  do {
    good = RandomProblem(random);
  } while (good.pass != Pass::kForward || good.params.queries < 100 || good.dtype != DTYPE_F16);
  traits.storage_16bit = true;
  PlanAttention(good, traits);
  AttentionProblem bad = good;
  bad.params.head_dim = 257;
  ExpectRefusal(bad, traits, "head_dim");
  bad = good;
  bad.params.query_heads = 2 * bad.params.kv_heads + 1;
  bad.params.kv_heads = 2;
  ExpectRefusal(bad, traits, "multiple");
  bad = good;
  bad.params.keys = 0;
  ExpectRefusal(bad, traits, "sequence lengths");
  bad = good;
  bad.params.batch_count += 1;
  ExpectRefusal(bad, traits, "batch_count");
  bad = good;
  bad.params.operand[OPERAND_K].row_stride = 0x7fffffff;
  bad.params.keys = 1000;
  ExpectRefusal(bad, traits, "split the sequence");
  traits.storage_16bit = false;
  ExpectRefusal(good, traits, "16-bit");
  traits.storage_16bit = true;
  traits.max_shared_memory = 1024;
  ExpectRefusal(good, traits, "shared memory");
}

}  // namespace
}  // namespace jax_aat

int main() {
  jax_aat::Fuzz();
  jax_aat::Refusals();
  return 0;
}
