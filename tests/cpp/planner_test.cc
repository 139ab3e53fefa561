// Fuzzes the planner: whatever the problem and the device, a plan must be bounded, its scratch
// disjoint, its grids complete and its work lists told apart where masks differ.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "attention/dispatch_plan.h"
#include "attention/example_plan.h"
#include "attention/plan_shape.h"
#include "random_problem.h"
#include "stored_gradients_test.h"
#include "tile_planner_test.h"
#include "tuning_test.h"

namespace jax_aat {
namespace {

std::uint64_t Tiles(const AttentionProblem& problem, const Dispatch& dispatch) {
  const AttentionParams& params = problem.params;
  const std::uint64_t tile_rows = dispatch.specialization[4], heads = dispatch.specialization[5];
  return dispatch.specialization[11] ? DivideUp(params.keys, tile_rows)
                                     : DivideUp(params.queries, tile_rows / heads);
}

// Checks that batch entries and heads share a list only where no operand that hides keys tells them
// apart, and that lists do not overlap; answers with the number of lists that the dispatch makes.
std::uint64_t CheckLists(const AttentionProblem& problem, const AttentionParams& params,
                         const Dispatch& dispatch) {
  constexpr std::pair<int, std::uint32_t> kHiding[] = {{OPERAND_MASK, FEATURE_MASK},
                                                       {OPERAND_Q_LENGTHS, FEATURE_Q_LENGTHS},
                                                       {OPERAND_KV_LENGTHS, FEATURE_KV_LENGTHS},
                                                       {OPERAND_Q_SEGMENTS, FEATURE_SEGMENTS},
                                                       {OPERAND_KV_SEGMENTS, FEATURE_SEGMENTS}};
  const bool transposed = dispatch.specialization[11] != 0;
  const std::uint32_t heads =
      transposed ? params.kv_heads : params.query_heads / dispatch.specialization[5];
  const bool heads_differ =
      (problem.features & FEATURE_MASK) && params.operand[OPERAND_MASK].head_stride != 0;
  const std::uint64_t capacity = transposed ? params.key_list_capacity : params.list_capacity;
  const std::uint64_t tiles = Tiles(problem, dispatch);
  EXPECT(capacity % (4 * tiles) == 0);
  const OperandLayout& headers =
      params.operand[transposed ? OPERAND_KEY_LIST_HEADERS : OPERAND_LIST_HEADERS];
  const OperandLayout& entries =
      params.operand[transposed ? OPERAND_KEY_LIST_ENTRIES : OPERAND_LIST_ENTRIES];
  std::set<std::uint64_t> lists, kinds;
  for (std::uint32_t entry = 0; entry < params.batch_count; ++entry) {
    for (std::uint32_t head = 0; head < heads; ++head) {
      std::uint64_t header = std::uint64_t{head} * headers.head_stride;
      std::uint64_t first = std::uint64_t{head} * entries.head_stride;
      std::uint64_t kind = heads_differ ? head : 0, rest = entry;
      for (int axis = MAX_BATCH_AXES - 1; axis >= 0; --axis) {
        const std::uint64_t index = rest % params.batch[axis];
        rest /= params.batch[axis];
        header += index * headers.batch_stride[axis];
        first += index * entries.batch_stride[axis];
        bool differs = false;
        for (const auto& [slot, feature] : kHiding) {
          differs |= (problem.features & feature) && params.operand[slot].batch_stride[axis] != 0;
        }
        kind = kind * 16 + (differs ? index : 0);
      }
      EXPECT(header % (4 * tiles) == 0 && header / (4 * tiles) * capacity == first);
      lists.insert(header / (4 * tiles));
      kinds.insert(kind);
    }
  }
  EXPECT(lists.size() == kinds.size());
  EXPECT(*lists.rbegin() == lists.size() - 1);
  return lists.size();
}

// Workgroups that share a list; the constant is there where there are any.
std::uint64_t Parts(const Dispatch& dispatch) {
  return dispatch.specialization.size() == 14 ? dispatch.specialization[13] : 1;
}

// Number of workgroups that a dispatch needs, from its specialisation alone.
std::uint64_t Workgroups(const AttentionProblem& problem, const AttentionParams& params,
                         const Dispatch& dispatch) {
  if (StartsWith(dispatch.shader, "attend_backward_delta")) {
    const std::uint64_t rows =
        std::uint64_t{params.queries} * params.query_heads * params.batch_count;
    return DivideUp(rows, dispatch.specialization[0] / 8);
  }
  if (StartsWith(dispatch.shader, "merge_parts")) {
    const std::uint64_t rows =
        std::uint64_t{params.queries} * params.query_heads * params.batch_count;
    return DivideUp(rows * DivideUp(params.head_dim, 4), dispatch.specialization[0]);
  }
  const std::uint64_t tile_rows = dispatch.specialization[4];
  const std::uint64_t heads = dispatch.specialization[5];
  const std::uint64_t query_tiles = DivideUp(params.queries, tile_rows / heads);
  const std::uint64_t key_tiles = DivideUp(params.keys, tile_rows);
  if (StartsWith(dispatch.shader, "work_lists")) {
    return CheckLists(problem, params, dispatch) * Tiles(problem, dispatch);
  }
  if (StartsWith(dispatch.shader, "attend_backward_dkv")) {
    const bool coarse = dispatch.specialization[2] & FEATURE_COARSE_TILE;
    return (coarse ? DivideUp(params.coarse_rows, tile_rows) : key_tiles) * params.kv_heads *
           params.batch_count;
  }
  if (StartsWith(dispatch.shader, "attend_backward_dbias")) {
    std::uint64_t tiles = 1;
    for (int axis = 0; axis <= MAX_BATCH_AXES; ++axis) tiles *= problem.dbias_extent[axis];
    return tiles * DivideUp(problem.dbias_extent[MAX_BATCH_AXES + 1], tile_rows) *
           DivideUp(problem.dbias_extent[MAX_BATCH_AXES + 2], dispatch.specialization[6]);
  }
  return query_tiles * (params.query_heads / heads) * params.batch_count * Parts(dispatch);
}

void CheckScratch(const AttentionProblem& problem, const DispatchPlan& plan) {
  const AttentionParams& params = plan.params;
  std::map<std::uint32_t, std::uint64_t> words;
  std::uint64_t taken = 0;
  for (const auto& [slot, offset, bytes, in_out] : plan.scratch) {
    EXPECT(!in_out && offset % 256 == 0 && bytes > 0 && offset + bytes <= plan.scratch_bytes);
    EXPECT(offset >= taken);
    taken = offset + bytes;
    EXPECT(words.emplace(slot, bytes / 4).second);
    EXPECT(bytes / 4 < kGuard);
  }
  for (const Dispatch& dispatch : plan.dispatches) {
    if (StartsWith(dispatch.shader, "attend_backward_delta")) {
      EXPECT(words[OPERAND_DELTA] >=
             std::uint64_t{params.queries} * params.query_heads * params.batch_count);
    }
    if (StartsWith(dispatch.shader, "merge_parts")) {
      EXPECT(words[OPERAND_RECORDS] >= std::uint64_t{params.queries} * params.query_heads *
                                           params.batch_count * Parts(dispatch) *
                                           (params.head_dim + 4));
    }
    if (!StartsWith(dispatch.shader, "work_lists")) continue;
    const bool transposed = dispatch.specialization[11] != 0;
    const std::uint64_t lists = CheckLists(problem, params, dispatch);
    EXPECT(words[transposed ? OPERAND_KEY_LIST_HEADERS : OPERAND_LIST_HEADERS] >=
           4 * lists * Tiles(problem, dispatch));
    EXPECT(words[transposed ? OPERAND_KEY_LIST_ENTRIES : OPERAND_LIST_ENTRIES] >=
           lists * (transposed ? params.key_list_capacity : params.list_capacity));
  }
  if (problem.features & FEATURE_PLAN) {
    EXPECT(words.count(OPERAND_LIST_ENTRIES) == 0 && words.count(OPERAND_KEY_LIST_ENTRIES) == 0);
    return;
  }
  const bool backward = problem.pass == Pass::kBackward;
  if (!backward || (problem.features & FEATURE_DQ)) EXPECT(words.count(OPERAND_LIST_ENTRIES) == 1);
  if (backward && (problem.features & (FEATURE_DK | FEATURE_DV))) {
    EXPECT(words.count(OPERAND_KEY_LIST_ENTRIES) == 1);
  }
}

void CheckDispatches(const AttentionProblem& problem, const DeviceTraits& traits,
                     const DispatchPlan& plan) {
  EXPECT(plan.dispatches.size() <= 9);
  int barriers = 0, kernels = 0, finishing = 0;
  bool merges_parts = false;
  for (const Dispatch& dispatch : plan.dispatches) {
    const auto& constants = dispatch.specialization;
    const bool merges = StartsWith(dispatch.shader, "merge_parts");
    const bool has_parts = problem.pass == Pass::kForward && constants.size() == 14;
    if (!has_parts) EXPECT(constants.size() == (dispatch.key_rows == KeyRows::kCoarse ? 15 : 13));
    EXPECT(!merges || has_parts);
    if (has_parts) {
      // A kernel whose tiles have parts, its careful pass, then that which merges as many.
      const std::size_t i = &dispatch - plan.dispatches.data();
      EXPECT(merges ? i > 0 : i + 1 < plan.dispatches.size());
      const Dispatch& other = plan.dispatches[merges ? i - 1 : i + 1];
      EXPECT(StartsWith(other.shader, "attend_forward") ||
             (!merges && StartsWith(other.shader, "merge_parts")));
      EXPECT(Parts(other) == Parts(dispatch) && Parts(dispatch) >= 4);
    }
    const bool on_matrices = dispatch.shader.find("_coopmat.") != std::string::npos;
    EXPECT(!on_matrices || traits.coopmat_layout_known || traits.coopmat_relays);
    EXPECT(((constants[2] & FEATURE_RELAYS) != 0) == (on_matrices && traits.coopmat_relays));
    EXPECT(constants[0] <= traits.max_workgroup_invocations);
    const std::uint64_t x = dispatch.groups[0], y = dispatch.groups[1];
    EXPECT(x <= traits.max_workgroup_count && y <= traits.max_workgroup_count);
    EXPECT(dispatch.groups[2] == 1);
    EXPECT(dispatch.first_head == 0);
    const std::uint64_t needed = Workgroups(problem, plan.params, dispatch);
    const bool careful = (constants[2] & FEATURE_CAREFUL) != 0;
    if (careful) {  // each of its workgroups may take many tiles
      EXPECT(y == 1 && x >= 1 && x <= needed);
    } else {
      EXPECT(x * y >= needed && x * (y - 1) < needed);
    }
    const bool prepares = StartsWith(dispatch.shader, "work_lists") ||
                          StartsWith(dispatch.shader, "attend_backward_delta");
    EXPECT(!(prepares && kernels > 0));
    // The first kernel waits for all that was prepared, a careful pass for the pass that it mends;
    // the others need not wait for each other.
    const bool waits = !prepares && kernels == 0 && &dispatch != &plan.dispatches.front();
    EXPECT(dispatch.barrier_before == (careful || merges || waits));
    barriers += dispatch.barrier_before;
    if (prepares) continue;
    ++kernels;
    if (careful || merges) {
      EXPECT(merges || StartsWith(dispatch.shader, "attend_forward_coopmat"));
      ++finishing;
      merges_parts |= merges;
      EXPECT(kernels == 1 + finishing && dispatch.flops == 0);
      continue;
    }
    EXPECT(constants[6] % 16 == 0 && constants[4] % constants[5] == 0);
    if (problem.features & FEATURE_PLAN) {
      // A kernel's tile lies in one query tile of the plan, its blocks too where they are queries.
      const bool by_key = StartsWith(dispatch.shader, "attend_backward_dkv");
      EXPECT(constants[by_key ? 6 : 4] <= PlanTileRows(plan.params));
      EXPECT(std::isnan(dispatch.flops) && (constants[2] & FEATURE_PLAN));
    } else {
      EXPECT(dispatch.flops > 0 || plan.params.window_left >= 0 || plan.params.window_right >= 0);
    }
    if (std::strcmp(plan.path, "portable") == 0) {
      EXPECT(constants[0] == constants[4] / constants[8] * 8 && constants[0] >= constants[4]);
    }
  }
  const bool careful = std::strcmp(plan.path, "coopmat") == 0 && kernels > 0;
  EXPECT(finishing == (problem.pass == Pass::kForward ? careful + merges_parts : 0));
  EXPECT(finishing > 0 ? barriers == finishing + !(problem.features & FEATURE_PLAN)
                       : barriers <= 1);
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
      const std::uint64_t capacity = transposed ? params.key_list_capacity : params.list_capacity;
      EXPECT(seen.size() <= capacity / Tiles(problem, dispatch));
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
    DeviceTraits traits = RandomTraits(random);
    if (Chance(random)) AddRandomTuning(random, problem, traits);
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
    CheckTuned(problem, traits, plan);
    if (std::uint64_t{problem.params.queries} * problem.params.keys <= 10000) {
      CheckCapacity(problem, plan);
      if (problem.pass == Pass::kForward) {
        const bool planned = problem.features & FEATURE_PLAN;
        const double flops = plan.dispatches[planned ? 0 : 1].flops;
        EXPECT(planned ? std::isnan(flops) : flops == CountedFlops(problem));
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

// Which lists are shared, and among how many workgroups.
void TestParts() {
  ExampleCall call = {.pass = "forward", .dtype = "bfloat16"};
  call.query_heads = 8;
  call.kv_heads = 2;
  call.head_dim = 64;
  DeviceTraits traits;
  traits.storage_16bit = traits.coopmat_bfloat16 = traits.coopmat_layout_known = true;
  traits.max_shared_memory = 49152;
  traits.min_subgroup_size = traits.max_subgroup_size = traits.subgroup_size = 32;
  traits.max_workgroup_invocations = 1024;
  const auto parts_and_path = [&](std::uint32_t queries, std::uint32_t keys) {
    call.queries = queries;
    call.keys = keys;
    const DispatchPlan plan = ExamplePlan(call, traits);
    return std::pair(Parts(plan.dispatches[1]), std::string(plan.path));
  };
  using Expected = std::pair<std::uint64_t, std::string>;
  EXPECT(parts_and_path(1, 131072) == Expected(128, "coopmat"));
  EXPECT(parts_and_path(9, 131072) == Expected(1, "coopmat"));
  traits.coopmat_bfloat16 = false;
  EXPECT(parts_and_path(1, 1023) == Expected(1, "portable"));
  EXPECT(parts_and_path(1, 1024) == Expected(4, "portable"));
  EXPECT(parts_and_path(8, 131072) == Expected(128, "portable"));
  EXPECT(parts_and_path(9, 131072) == Expected(1, "portable"));
  call.batch = 64;
  EXPECT(parts_and_path(1, 4096) == Expected(16, "portable"));
  call.causal = true;  // a query sees a key
  EXPECT(parts_and_path(1, 131072) == Expected(1, "portable"));
  call.causal = false;
  // A driver that ends loops serves some more keys so.
  traits.max_loop_iterations = (1 << 16) - 1;
  EXPECT(parts_and_path(1, 60000) == Expected(128, "portable"));
  call.keys = 70000;
  ExpectRefusal(ExampleProblem(call), traits, "loops");
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
  bad = RandomPlanning(random);
  bad.params.level_count = 4;
  ExpectRefusal(bad, traits, "1 to 3 levels");
  bad.params.level_count = 3;
  bad.features |= FEATURE_MASK;
  ExpectRefusal(bad, traits, "mask or a bias");
  bad = RandomPlanning(random);
  bad.features &= ~FEATURE_PRICES;
  ExpectRefusal(bad, traits, "1 to all of the");
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
  traits.max_loop_iterations = 100;
  ExpectRefusal(good, traits, "loops");
  traits.max_loop_iterations = 0;
  traits.max_shared_memory = 1024;
  ExpectRefusal(good, traits, "shared memory");
}

}  // namespace
}  // namespace jax_aat

int main() {
  jax_aat::Fuzz();
  jax_aat::FuzzPlanning();
  jax_aat::FuzzRouting();
  jax_aat::FuzzStoredGradients();
  jax_aat::FuzzMeans();
  jax_aat::TestShapes();
  jax_aat::TestParts();
  jax_aat::TestSharedNotes();
  jax_aat::TestCorrection();
  jax_aat::TestScratchOfPlans();
  jax_aat::TestPlanningInOut();
  jax_aat::TestShares();
  jax_aat::Refusals();
  return 0;
}
