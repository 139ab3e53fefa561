// Fuzzes the planner of tiles: its dispatches must be those of the call, in order, each after a
// barrier where it needs one, its grids complete and its scratch disjoint.
#include "tile_planner_test.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>

#include "attention/kernels.h"
#include "planned_example.h"
#include "random_problem.h"

namespace jax_aat {

// A call that makes a plan of given prices.
AttentionProblem RandomPlanning(Random& random) {
  AttentionProblem problem = RandomProblem(random);
  problem.pass = Pass::kPlan;
  problem.features &= FEATURE_CAUSAL | FEATURE_WINDOW | FEATURE_Q_LENGTHS | FEATURE_KV_LENGTHS |
                      FEATURE_SEGMENTS | FEATURE_SOFT_CAP;
  problem.features |= FEATURE_PLAN | FEATURE_MAKES_LISTS | FEATURE_PRICES;
  if (Chance(random)) problem.features |= FEATURE_MAKES_KEY_LISTS;
  if (Chance(random)) {
    problem.features |= FEATURE_SPARE_ROWS;
  } else if (Chance(random)) {
    problem.features |= FEATURE_PREVIOUS_LEVELS;
  }
  SetPlanShape(problem.params, Pick(random, {16, 32, 64, 128, 256}), Pick(random, {256, 512, 1024}),
               Pick(random, {4, 1000}), Pick(random, {1, 1000}));
  problem.params.level_count = Pick(random, {1, 2, 3});
  return problem;
}

namespace {

// What the dispatches of a planning call must be, in order.
struct Expected {
  const char* shader;
  std::uint64_t workgroups;
  bool barrier;
};

std::vector<Expected> ExpectedPlanning(const AttentionProblem& problem, std::uint64_t threads) {
  const AttentionParams& params = problem.params;
  const std::uint64_t heads = params.query_heads / TileHeads(params), batch = params.batch_count;
  const std::uint64_t tiles = heads * params.plan_tiles;
  const std::uint64_t key_lists = KeyListTiles(params) * std::uint64_t{params.kv_heads} * batch;
  std::vector<Expected> expected;
  if (problem.features & FEATURE_SEGMENTS) {
    const std::uint64_t groups = DivideUp(params.keys, 16 * params.super_tile_granules) +
                                 DivideUp(params.plan_tiles, params.super_tile_granules);
    expected.push_back({"segment_ranges.f32", groups * batch, false});
  }
  if (problem.features & FEATURE_SPARE_ROWS) {
    expected.push_back({"plan_price.f32", DivideUp(2112 * batch, threads), false});
    expected.push_back({"plan_price.f32", DivideUp(tiles, 8) * batch, true});
    expected.push_back({"plan_price.f32", DivideUp(tiles, 8) * batch, true});
    expected.push_back({"plan_price.f32", batch, true});
  }
  expected.push_back({"plan_levels.f32", tiles * batch, !expected.empty()});
  expected.push_back({"plan_list_starts.f32", heads * batch, true});
  const bool transposed = problem.features & FEATURE_MAKES_KEY_LISTS;
  if (transposed) expected.push_back({"plan_key_lists.f32", key_lists, false});
  expected.push_back({"plan_lists.f32", tiles * batch, true});
  if (transposed) expected.push_back({"plan_key_lists.f32", key_lists, false});
  return expected;
}

void CheckPlanning(const AttentionProblem& problem, const DeviceTraits& traits,
                   const DispatchPlan& plan) {
  const std::uint64_t threads = std::min(256u, traits.max_workgroup_invocations);
  const std::vector<Expected> expected = ExpectedPlanning(problem, threads);
  EXPECT(plan.dispatches.size() == expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const Dispatch& dispatch = plan.dispatches[i];
    EXPECT(dispatch.shader == expected[i].shader);
    EXPECT(dispatch.barrier_before == expected[i].barrier);
    EXPECT(dispatch.specialization[0] == (StartsWith(dispatch.shader, "segment_ranges")
                                              ? problem.params.super_tile_granules
                                              : threads));
    const std::uint64_t x = dispatch.groups[0], y = dispatch.groups[1];
    EXPECT(x <= traits.max_workgroup_count && y <= traits.max_workgroup_count);
    EXPECT(x * y >= expected[i].workgroups && x * (y - 1) < expected[i].workgroups);
  }
  // Scratch of each batch entry lies apart.
  const AttentionParams& params = plan.params;
  std::map<std::uint32_t, std::uint64_t> words;
  if (problem.features & FEATURE_SPARE_ROWS) words[OPERAND_HISTOGRAM] = 2112;
  if (problem.features & FEATURE_SEGMENTS) {
    words[OPERAND_SEGMENT_RANGES] = 2 * (std::uint64_t{params.coarse_rows} + params.plan_tiles);
  }
  EXPECT(plan.scratch.size() == words.size());
  for (const auto& [slot, offset, bytes, in_out] : plan.scratch) {
    EXPECT(!in_out && offset % 256 == 0 && bytes >= 4 * words.at(slot) * params.batch_count);
    std::uint64_t stride = words.at(slot);
    for (int axis = MAX_BATCH_AXES - 1; axis >= 0; --axis) {
      EXPECT(params.operand[slot].batch_stride[axis] == (params.batch[axis] == 1 ? 0 : stride));
      stride *= params.batch[axis];
    }
  }
}

// What nobody keeps is laid out as results are, but for the lists, which follow each other.
void CheckScratchOfPlan(const AttentionProblem& problem, const DispatchPlan& plan) {
  const AttentionParams& params = plan.params;
  const std::uint32_t lists = params.query_heads / TileHeads(params);
  const std::uint32_t tiles = params.plan_tiles, words = LevelWords(params);
  const auto check_batch = [&](std::uint32_t slot, std::uint64_t stride) {
    const OperandLayout& layout = params.operand[slot];
    for (int axis = MAX_BATCH_AXES - 1; axis >= 0; --axis) {
      EXPECT(layout.batch_stride[axis] == (params.batch[axis] == 1 ? 0 : stride));
      stride *= params.batch[axis];
    }
    const auto part = std::ranges::find(plan.scratch, slot, &DispatchPlan::Scratch::operand);
    EXPECT(part != plan.scratch.end() && part->bytes >= 4 * stride);
  };
  const auto check = [&](std::uint32_t slot, std::uint32_t rows, std::uint32_t row_words) {
    if (problem.keeps_levels) {
      EXPECT(std::ranges::find(plan.scratch, slot, &DispatchPlan::Scratch::operand) ==
             plan.scratch.end());
      return;
    }
    const OperandLayout& layout = params.operand[slot];
    const std::uint64_t stride = std::uint64_t{rows} * row_words;
    EXPECT(layout.head_stride == stride && layout.row_stride == row_words);
    check_batch(slot, stride * lists);
  };
  check(OPERAND_LEVELS, tiles, words);
  check(OPERAND_LIST_HEADERS, tiles, 4);
  if (problem.features & FEATURE_SPARE_ROWS) check(OPERAND_LAMBDA, 1, 1);
  EXPECT(params.list_capacity == problem.params.list_capacity * lists);
  EXPECT(params.operand[OPERAND_LIST_ENTRIES].head_stride == 0);
  check_batch(OPERAND_LIST_ENTRIES, params.list_capacity);
}

// The steps of a call, which barriers divide, in which scratch is used: the first and the last.
struct Use {
  int first, last;
};
enum Step { kBefore, kRouting, kLevels, kLists, kAttention };

Use UseOf(std::uint32_t slot) {
  switch (slot) {
    case OPERAND_KEY_SUMMARIES:
    case OPERAND_ROUTER_SCRATCH:
      return {kRouting, kRouting};
    case OPERAND_PRICES:
      return {kRouting, kLevels};
    case OPERAND_LEVELS:
      return {kLevels, kLists};
    case OPERAND_LIST_ENTRIES:
      return {kLists, kAttention};
    default:
      return {kBefore, kAttention};
  }
}

// Bytes of the output that a call may use as it likes until it writes it.
std::uint64_t OutBytes(const AttentionParams& params, std::uint32_t dtype) {
  return std::uint64_t{params.batch_count} * params.queries * params.query_heads * params.head_dim *
         (dtype == DTYPE_F32 ? 4 : 2);
}

// What a call uses at a time lies apart, within scratch or within the output; there nothing that is
// used once the kernels of attention begin.
void CheckPlaces(const AttentionProblem& problem, const DispatchPlan& plan) {
  const std::uint64_t out_bytes = OutBytes(plan.params, problem.dtype);
  for (const DispatchPlan::Scratch& part : plan.scratch) {
    const Use use = UseOf(part.operand);
    EXPECT(part.offset % 256 == 0);
    EXPECT(part.offset + part.bytes <= (part.in_out ? out_bytes : plan.scratch_bytes));
    EXPECT(!part.in_out || (problem.pass == Pass::kForward && use.last < kAttention));
    for (const DispatchPlan::Scratch& other : plan.scratch) {
      if (&other == &part || other.in_out != part.in_out) continue;
      const Use other_use = UseOf(other.operand);
      EXPECT(other.operand != part.operand);
      EXPECT(use.last < other_use.first || other_use.last < use.first ||
             part.offset + part.bytes <= other.offset || other.offset + other.bytes <= part.offset);
    }
  }
}

// A forward call that makes its plan first makes it alike, then waits for it.
void CheckPlanningForward(AttentionProblem problem, const DeviceTraits& traits,
                          const std::vector<Dispatch>& planning) {
  problem.pass = Pass::kForward;
  const DispatchPlan plan = PlanAttention(problem, traits);
  CheckPlaces(problem, plan);
  EXPECT(plan.dispatches.size() > planning.size());
  if (!problem.keeps_lists) CheckScratchOfPlan(problem, plan);
  for (std::size_t i = 0; i < plan.dispatches.size(); ++i) {
    const Dispatch& dispatch = plan.dispatches[i];
    if (i < planning.size()) {
      EXPECT(dispatch.shader == planning[i].shader);
      std::vector<std::uint32_t> expected = planning[i].specialization;
      const bool has_joined = StartsWith(dispatch.shader, "plan_list");
      if (has_joined && !problem.keeps_lists) expected.at(13) = 1;
      EXPECT(dispatch.specialization == expected);
      EXPECT(dispatch.barrier_before == planning[i].barrier_before);
    } else {
      const bool attends = StartsWith(dispatch.shader, "attend_forward");
      EXPECT((attends || StartsWith(dispatch.shader, "merge_parts")) && dispatch.barrier_before);
      EXPECT(dispatch.specialization[2] & FEATURE_PLAN);
    }
  }
}

// Prices that are made on the way lie in scratch: a row a tile, of what it looks into where that is
// less than all.
void CheckPrices(const AttentionProblem& problem, const DispatchPlan& plan) {
  const AttentionParams& params = plan.params;
  const std::uint64_t granules = DivideUp(params.keys, 16);
  const std::uint64_t brief = std::uint64_t{params.judged_key_tiles} * 9 + 4;
  const bool is_brief = params.judged_key_tiles < KeyTiles(params) && brief < granules;
  EXPECT(params.priced_key_tiles == (is_brief ? params.judged_key_tiles : 0));
  const std::uint64_t row = is_brief ? brief : granules;
  EXPECT(params.operand[OPERAND_PRICES].row_stride == row);
  for (const DispatchPlan::Scratch& part : plan.scratch) {
    if (part.operand != OPERAND_PRICES) continue;
    const std::uint64_t lists = problem.params.query_heads / TileHeads(params);
    EXPECT(part.bytes >= 4 * row * params.plan_tiles * lists * params.batch_count);
    return;
  }
  EXPECT(false);
}

}  // namespace

void FuzzRouting() {
  Random random(11);
  for (round = 0; round < kRounds; ++round) {
    AttentionProblem problem = RandomPlanning(random);
    problem.features &= ~FEATURE_PRICES;
    const std::uint32_t key_tiles = KeyTiles(problem.params);
    problem.params.judged_key_tiles = Pick(random, {1, std::max(1u, key_tiles / 5), key_tiles});
    problem.params.candidate_share = Chance(random) ? 0.1f : 0.0f;
    const DeviceTraits traits = RandomTraits(random);
    try {
      CheckPrices(problem, PlanAttention(problem, traits));
      problem.pass = Pass::kForward;
      problem.keeps_lists = Chance(random);
      problem.keeps_levels = problem.keeps_lists || Chance(random);
      const DispatchPlan plan = PlanAttention(problem, traits);
      CheckPrices(problem, plan);
      CheckPlaces(problem, plan);
    } catch (const std::invalid_argument& error) {
      EXPECT(std::string(error.what()).find("split") != std::string::npos);
    }
  }
}

// What the router keeps in shared memory (constant 16), as many as there may be of each.
void TestSharedNotes() {
  ExampleCall call = PlannedCall("bfloat16");
  call.head_dim = 128;
  call.candidate_share = 0.25f;
  DeviceTraits traits = LargeDevice();
  const auto notes = [&](std::uint32_t keys, std::uint32_t judged, std::uint32_t shared_memory) {
    call.queries = call.keys = keys;
    call.judged_key_tiles = judged;
    traits.max_shared_memory = shared_memory;
    for (const Dispatch& dispatch : ExamplePlan(call, traits).dispatches) {
      if (StartsWith(dispatch.shader, "cross_tile_router")) return dispatch.specialization.at(16);
    }
    return 0u;
  };
  EXPECT(notes(16384, 128, 49152) == 1024);
  EXPECT(notes(32768, 256, 49152) == 2048);
  EXPECT(notes(32768, 256, 49151) == 1);
  // Of 1,024 key tiles some are looked into, whose names need room, too.
  EXPECT(notes(131072, 64, 49152) == 1024);
  EXPECT(notes(131072, 64, 45567) == 1);
  EXPECT(notes(262144, 128, 49152) == 1);
}

// Of a plan that nobody keeps all is scratch; entries of lists may lie where prices were and what
// these are made from, levels where that was.
void TestScratchOfPlans() {
  ExampleCall call = PlannedCall("float32");
  const DeviceTraits traits = LargeDevice();
  const DispatchPlan kept = ExamplePlan(call, traits);
  for (const std::uint32_t capacity : {1u << 12, 1u << 22}) {
    call.list_capacity = capacity;
    const DispatchPlan plan = ExamplePlan(call, traits);
    EXPECT(plan.dispatches.size() == kept.dispatches.size());
    CheckPlaces(ExampleProblem(call), plan);
    std::map<std::uint32_t, DispatchPlan::Scratch> parts;
    for (const DispatchPlan::Scratch& part : plan.scratch) parts.emplace(part.operand, part);
    const std::uint64_t tiles = std::uint64_t{2} * plan.params.plan_tiles;
    EXPECT(parts.at(OPERAND_LEVELS).bytes >= 4 * tiles * LevelWords(plan.params));
    EXPECT(parts.at(OPERAND_LIST_HEADERS).bytes >= 16 * tiles);
    EXPECT(parts.at(OPERAND_LIST_ENTRIES).bytes >= std::uint64_t{8} * capacity);
    EXPECT(parts.at(OPERAND_LAMBDA).bytes >= 8);
    EXPECT(plan.params.list_capacity == 2 * capacity);
  }
}

std::uint64_t RouterWorkgroups(const DispatchPlan& plan) {
  const auto router = std::ranges::find_if(plan.dispatches, [](const Dispatch& dispatch) {
    return StartsWith(dispatch.shader, "cross_tile_router");
  });
  return std::uint64_t{router->groups[0]} * router->groups[1];
}

// Where planning lies: in the output as far as that has room, the rest where entries of lists lie
// later. Long calls are not to take much more than their operands and results.
void TestPlanningInOut() {
  constexpr std::uint32_t kOfPlanning[] = {OPERAND_PRICES, OPERAND_KEY_SUMMARIES,
                                           OPERAND_ROUTER_SCRATCH, OPERAND_LEVELS};
  struct Case {
    std::uint32_t query_tile;
    float candidate_share;
    std::uint32_t list_capacity;  // by router.py, of budget=0.03; 0: the plan is kept
    double mebibytes;
    std::uint64_t slabs;  // of the router's workgroups, fewer where the output has no room for all
    bool slabs_fit = true;
  };
  for (const Case& expected :
       {Case{128, 0.0f, 7817604, 68.1, 1024}, Case{128, 0.0625f, 6769020, 162.7, 1024, false},
        Case{256, 0.0f, 3880130, 38.0, 748}, Case{128, 0.0f, 0, 8.4, 1024}}) {
    ExampleCall call = PlannedCall("bfloat16");
    call.queries = call.keys = 131072;
    call.judged_key_tiles = 64;
    call.query_tile = expected.query_tile;
    call.candidate_share = expected.candidate_share;
    call.list_capacity = expected.list_capacity;
    AttentionProblem problem = ExampleProblem(call);
    const DispatchPlan plan = PlanAttention(problem, LargeDevice());
    CheckPlaces(problem, plan);
    EXPECT(std::abs(std::ldexp(plan.scratch_bytes, -20) - expected.mebibytes) < 0.1);
    EXPECT(RouterWorkgroups(plan) == expected.slabs);
    std::uint64_t of_planning = 0;
    for (const DispatchPlan::Scratch& part : plan.scratch) {
      const bool is_planning = std::ranges::find(kOfPlanning, part.operand) != kOfPlanning + 4;
      // Few slabs would take the router long, so they may lie apart.
      const bool fits = part.operand != OPERAND_ROUTER_SCRATCH || expected.slabs_fit;
      EXPECT(part.in_out == (is_planning && fits));
      of_planning += is_planning;
    }
    EXPECT(of_planning == (expected.list_capacity == 0 ? 3 : 4));
    // Where the output is part of something else, that is not to be written.
    problem.params.operand[OPERAND_OUT].row_stride += 8;
    const DispatchPlan apart = PlanAttention(problem, LargeDevice());
    EXPECT(std::ranges::none_of(apart.scratch, &DispatchPlan::Scratch::in_out));
    EXPECT(apart.scratch_bytes > plan.scratch_bytes);
  }
}

void FuzzPlanning() {
  Random random(3);
  for (round = 0; round < kRounds; ++round) {
    AttentionProblem problem = RandomPlanning(random);
    const DeviceTraits traits = RandomTraits(random);
    try {
      const DispatchPlan plan = PlanAttention(problem, traits);
      CheckPlanning(problem, traits, plan);
      problem.keeps_lists = Chance(random);
      problem.keeps_levels = problem.keeps_lists || Chance(random);
      CheckPlanningForward(problem, traits, plan.dispatches);
    } catch (const std::invalid_argument& error) {
      EXPECT(std::string(error.what()).find("split") != std::string::npos);
    }
  }
}

}  // namespace jax_aat
