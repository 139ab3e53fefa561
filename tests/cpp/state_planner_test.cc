// Fuzzes the planner of coarse rows and state: its dispatches must be those of the call, in order
// around those of a call that is given coarse rows, its grids complete and its scratch large
// enough.
#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/traffic.h"
#include "planned_example.h"
#include "tile_planner_test.h"

namespace jax_aat {
namespace {

struct Expected {
  std::string shader;
  std::uint64_t workgroups;
  bool barrier;
};

AttentionProblem RandomMeans(Random& random) {
  AttentionProblem problem;
  do {
    problem = RandomProblem(random);
  } while (!(problem.features & FEATURE_PLAN) || problem.pass == Pass::kTangent);
  const auto set = [&](std::uint32_t feature, bool on) {
    problem.features = on ? problem.features | feature : problem.features & ~feature;
  };
  const bool corrects = Chance(random), backward = problem.pass == Pass::kBackward;
  const auto has = [&](std::uint32_t feature) { return (problem.features & feature) != 0; };
  set(FEATURE_MAKES_MEANS, true);
  set(FEATURE_CORRECTS | FEATURE_LEVEL_BIAS, corrects);
  set(FEATURE_DCOARSE_K, backward && has(FEATURE_DK));
  set(FEATURE_DCOARSE_V, backward && has(FEATURE_DV));
  set(FEATURE_DLEVEL_BIAS, backward && corrects && has(FEATURE_DQ | FEATURE_DK));
  set(FEATURE_DSHARES, backward && corrects && has(FEATURE_DOUT));
  return problem;
}

// The number of workgroups of each kernel, by the words of docs/architecture.md.
std::map<std::string, std::uint64_t> Grids(const AttentionParams& params, std::uint64_t threads) {
  const std::uint64_t heads = std::uint64_t{params.kv_heads} * params.batch_count;
  const std::uint64_t super_tiles = DivideUp(params.keys, 16 * params.super_tile_granules) * heads;
  const std::uint64_t parts = DivideUp(params.queries, 16 * params.super_tile_granules) * heads;
  const std::uint64_t side = DivideUp(params.head_dim, 32), quads = DivideUp(params.head_dim, 4);
  const std::uint64_t rows_of_part =
      16 * params.super_tile_granules * (params.query_heads / params.kv_heads);
  const std::uint64_t rows =
      std::uint64_t{params.queries} * params.query_heads * params.batch_count;
  const std::uint64_t vectors = DivideUp((4 * quads + 2) * quads * heads, threads);
  return {{"coarse_rows", super_tiles},
          {"state_covariance", side * side * super_tiles},
          {"state_prefix", vectors},
          {"state_level_bias", DivideUp(rows, threads / 8)},
          {"state_correction", rows_of_part / 64 * parts},
          {"state_cotangents", rows_of_part / 64 * parts},
          {"state_covariance_gradient", side * side * parts},
          {"state_query_gradient", rows_of_part / 64 * parts},
          {"state_variance_gradient", DivideUp(quads, 4) * parts},
          {"state_suffix", vectors},
          {"sum_parts", DivideUp(params.coarse_rows * quads, threads) * heads},
          {"key_gradients", DivideUp(params.keys, 64) * heads}};
}

const Dispatch* Find(const DispatchPlan& plan, const char* shader) {
  for (const Dispatch& dispatch : plan.dispatches) {
    if (StartsWith(dispatch.shader, shader)) return &dispatch;
  }
  return nullptr;
}

// Whether the kernel of attention adds what the state gives back itself: on matrices, in bfloat16,
// where shared memory holds a covariance and no other kernel comes after it.
bool CorrectsItself(const DispatchPlan& plan) {
  return plan.params.head_dim <= 128 && Find(plan, "attend_forward_coopmat.bf16") != nullptr &&
         Find(plan, "merge_parts") == nullptr;
}

// Those before the kernels of attention and those after them.
std::vector<Expected> ExpectedAround(const AttentionProblem& problem, const DispatchPlan& plan,
                                     std::uint64_t threads, bool before) {
  const auto has = [&](std::uint32_t feature) { return (problem.features & feature) != 0; };
  const bool corrects = has(FEATURE_CORRECTS), backward = problem.pass == Pass::kBackward;
  const bool keys = has(FEATURE_DK | FEATURE_DV), tilts = corrects && has(FEATURE_DOUT);
  const auto grids = Grids(problem.params, threads);
  std::vector<Expected> expected;
  const auto add = [&](const char* shader, bool wanted, bool barrier) {
    if (wanted) expected.push_back({shader, grids.at(shader), barrier});
  };
  if (before) {
    add("coarse_rows", true, false);
    add("state_covariance", corrects, true);
    add("state_prefix", corrects, true);
    add("state_level_bias", corrects && (backward || !CorrectsItself(plan)), true);
    add("state_cotangents", backward && tilts, true);
    add("state_covariance_gradient", backward && tilts && keys, false);
  } else if (!backward) {
    add("state_correction", corrects && !CorrectsItself(plan), true);
  } else {
    const bool queries = corrects && has(FEATURE_DQ);
    const bool parts = keys && CoarseListPartsOf(problem.params).of_super_means > 1;
    add("state_query_gradient", queries, true);
    add("sum_parts", parts, !queries);
    add("state_variance_gradient", corrects && has(FEATURE_DK), !queries && !parts);
    add("state_suffix", corrects && keys, true);
    add("key_gradients", keys, true);
  }
  return expected;
}

void CheckAround(const std::vector<Expected>& expected, const Dispatch* dispatch,
                 const DeviceTraits& traits) {
  for (const Expected& one : expected) {
    EXPECT(dispatch->shader.substr(0, dispatch->shader.find('.')) == one.shader);
    EXPECT(dispatch->barrier_before == one.barrier);
    EXPECT(dispatch->specialization.size() == (one.shader == "sum_parts" ? 15 : 13));
    EXPECT(dispatch->specialization[0] <= traits.max_workgroup_invocations);
    const std::uint64_t x = dispatch->groups[0], y = dispatch->groups[1];
    EXPECT(x * y >= one.workgroups && x * (y - 1) < one.workgroups);
    ++dispatch;
  }
}

void CheckScratch(const AttentionProblem& problem, const DispatchPlan& plan) {
  const AttentionParams& params = plan.params;
  std::map<std::uint32_t, std::uint64_t> words;
  for (const DispatchPlan::Scratch& part : plan.scratch) {
    EXPECT(!part.in_out && words.emplace(part.operand, part.bytes / 4).second);
  }
  const std::uint64_t heads = std::uint64_t{params.kv_heads} * params.batch_count;
  const std::uint64_t super_tiles = DivideUp(params.keys, 16 * params.super_tile_granules);
  const std::uint64_t state =
      16 * DivideUp(params.head_dim, 4) * (DivideUp(params.head_dim, 4) + 1);
  // In the dtype of the keys.
  const std::uint64_t elements_of_word = problem.dtype == DTYPE_F32 ? 1 : 2;
  const auto has_rows = [&](std::uint32_t slot, std::uint64_t rows) {
    const std::uint64_t least = DivideUp(heads * rows * params.head_dim, elements_of_word);
    EXPECT(words[slot] >= least && words[slot] < least + 64);
  };
  has_rows(OPERAND_COARSE_K, params.coarse_rows);
  has_rows(OPERAND_COARSE_V, params.coarse_rows);
  if (problem.features & FEATURE_CORRECTS) {
    EXPECT(words[OPERAND_STATE] >= heads * (super_tiles + 1) * state);
    if (problem.pass == Pass::kBackward || !CorrectsItself(plan)) {
      EXPECT(words[OPERAND_LEVEL_BIAS] >=
             std::uint64_t{2} * params.queries * params.query_heads * params.batch_count);
    }
  }
  if (problem.pass != Pass::kBackward || !(problem.features & (FEATURE_DK | FEATURE_DV))) return;
  const CoarseListParts parts_of_lists = CoarseListPartsOf(params);
  EXPECT(parts_of_lists.of_super_means >= parts_of_lists.of_means);
  const auto parts_of_row = [&](std::uint64_t row) {
    const bool among_super_means = row / 128 * 128 + 128 > DivideUp(params.keys, 16);
    return among_super_means ? parts_of_lists.of_super_means : parts_of_lists.of_means;
  };
  std::uint64_t sums = 0;
  for (std::uint64_t row = 0; row < params.coarse_rows; ++row) sums += parts_of_row(row);
  has_rows(OPERAND_DCOARSE_K, sums);
  has_rows(OPERAND_DCOARSE_V, sums);
  for (const Dispatch& dispatch : plan.dispatches) {
    if (dispatch.key_rows != KeyRows::kCoarse) continue;
    EXPECT(dispatch.specialization.at(13) == parts_of_lists.of_means);
    EXPECT(dispatch.specialization.at(14) == parts_of_lists.of_super_means);
    const std::uint64_t tile_rows = dispatch.specialization[4];
    std::uint64_t shares = 0;
    for (std::uint64_t row = 0; row < params.coarse_rows; row += tile_rows) {
      shares += parts_of_row(row);
    }
    EXPECT(std::uint64_t{dispatch.groups[0]} * dispatch.groups[1] >= shares * heads);
  }
  if (problem.features & FEATURE_CORRECTS) {
    const std::uint64_t parts = DivideUp(params.queries, 16 * params.super_tile_granules);
    EXPECT(words[OPERAND_DSTATE] >= heads * std::max(super_tiles, parts) * state);
  }
}

// The kernels of attention are those of a call that is given coarse rows.
void CheckAttention(AttentionProblem problem, const DeviceTraits& traits, const Dispatch* dispatch,
                    std::size_t count) {
  problem.features &= ~(FEATURE_MAKES_MEANS | FEATURE_CORRECTS);
  const DispatchPlan given = PlanAttention(problem, traits);
  EXPECT(given.dispatches.size() == count);
  bool waits = false;
  for (std::size_t i = 0; i < count; ++i) {
    EXPECT(dispatch[i].shader == given.dispatches[i].shader);
    waits |= dispatch[i].barrier_before;
    const bool prepares = StartsWith(dispatch[i].shader, "attend_backward_delta");
    EXPECT(waits || prepares);
  }
}

}  // namespace

void FuzzMeans() {
  Random random(4);
  for (round = 0; round < kRounds; ++round) {
    const AttentionProblem problem = RandomMeans(random);
    const DeviceTraits traits = RandomTraits(random);
    try {
      const DispatchPlan plan = PlanAttention(problem, traits);
      const std::uint64_t threads = std::min(256u, traits.max_workgroup_invocations);
      const auto before = ExpectedAround(problem, plan, threads, true);
      const auto after = ExpectedAround(problem, plan, threads, false);
      EXPECT(plan.dispatches.size() >= before.size() + after.size());
      const Dispatch* first = plan.dispatches.data();
      CheckAround(before, first, traits);
      CheckAround(after, first + plan.dispatches.size() - after.size(), traits);
      CheckAttention(problem, traits, first + before.size(),
                     plan.dispatches.size() - before.size() - after.size());
      CheckScratch(problem, plan);
    } catch (const std::invalid_argument& error) {
      EXPECT(std::string(error.what()).find("split") != std::string::npos);
    }
  }
}

// They are written where they are a result or the correction reads them.
void TestShares() {
  for (const char* dtype : {"bfloat16", "float16"}) {
    for (const std::uint32_t queries : {1u, 1024u}) {  // workgroups share a list, or do not
      for (const std::uint32_t capacity : {0u, 4096u}) {
        ExampleCall call = PlannedCall(dtype);
        call.causal = false;
        call.queries = queries;
        call.keys = 8192;
        call.list_capacity = capacity;
        const DispatchPlan plan = ExamplePlan(call, LargeDevice());
        const bool is_apart = Find(plan, "state_correction") != nullptr;
        const bool is_scratch = is_apart && capacity > 0;
        const auto part =
            std::ranges::find(plan.scratch, OPERAND_SHARES, &DispatchPlan::Scratch::operand);
        EXPECT((part != plan.scratch.end()) == is_scratch);
        EXPECT(!is_scratch || part->bytes >= std::uint64_t{8} * queries * call.query_heads);
        for (const Dispatch& dispatch : plan.dispatches) {
          const bool merges = StartsWith(dispatch.shader, "merge_parts");
          if (!merges && !StartsWith(dispatch.shader, "attend_forward")) continue;
          EXPECT(((dispatch.specialization[2] & FEATURE_SHARES) != 0) ==
                 (is_apart || capacity == 0));
          EXPECT(!merges || queries == 1);
        }
      }
    }
  }
}

// In the kernel of attention where that is on matrices, else after it.
void TestCorrection() {
  ExampleCall call = PlannedCall("bfloat16");
  DeviceTraits traits = LargeDevice();
  const auto is_apart = [&] {
    const DispatchPlan plan = ExamplePlan(call, traits);
    const bool apart = Find(plan, "state_correction") != nullptr;
    const Dispatch& forward = *Find(plan, "attend_forward");
    Dispatch without = forward;
    without.specialization[2] &= ~FEATURE_CORRECTS;
    EXPECT(apart == (without.specialization == forward.specialization));
    const auto state =
        std::ranges::find(plan.scratch, OPERAND_STATE, &DispatchPlan::Scratch::operand);
    const double read = apart ? 0 : static_cast<double>(state->bytes);
    EXPECT(Traffic(plan, forward, {}) == Traffic(plan, without, {}) + read);
    EXPECT(apart == (Find(plan, "state_level_bias") != nullptr));
    return apart;
  };
  for (const std::uint32_t head_dim : {40, 64, 128}) {
    call.head_dim = head_dim;
    EXPECT(!is_apart());
  }
  call.dtype = "float16";
  EXPECT(is_apart());
  call.dtype = "bfloat16";
  call.causal = false;
  call.queries = 1;  // so that workgroups share a list
  call.keys = 8192;
  EXPECT(is_apart());
  call.queries = 1024;
  traits.coopmat_layout_known = false;
  EXPECT(is_apart());
}

}  // namespace jax_aat
