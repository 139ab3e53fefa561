// Fuzzes backward passes whose score gradients are stored for some heads at a time: each head must
// be written once and read once, after a barrier, before another head takes its place.
#include "stored_gradients_test.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

#include "attention/kernels.h"
#include "random_problem.h"

namespace jax_aat {
namespace {

constexpr std::uint64_t kTileRows = 128;  // of what is stored

AttentionProblem RandomBackward(Random& random) {
  AttentionProblem problem;
  problem.pass = Pass::kBackward;
  problem.dtype = Pick(random, {DTYPE_F16, DTYPE_BF16});
  problem.features = FEATURE_DQ | FEATURE_DK | FEATURE_DV | FEATURE_DOUT;
  if (Chance(random)) problem.features |= FEATURE_CAUSAL;
  AttentionParams& params = problem.params;
  params.batch_count = 1;
  for (std::uint32_t& extent : params.batch) {
    extent = Pick(random, {1, 2, 5});
    params.batch_count *= extent;
  }
  params.queries = Pick(random, {1, 100, 1000, 4096});
  params.keys = Pick(random, {1, 100, 1000, 4096});
  params.kv_heads = Pick(random, {1, 3, 16});
  params.query_heads = params.kv_heads * Pick(random, {1, 3, 4, 32});
  params.head_dim = Pick(random, {72, 128, 256});
  params.window_left = params.window_right = -1;
  return problem;
}

// Bytes of the scratch of a slot; 0: it has none.
std::uint64_t ScratchBytes(const DispatchPlan& plan, std::uint32_t slot) {
  for (const DispatchPlan::Scratch& part : plan.scratch) {
    if (part.operand == slot) return part.bytes;
  }
  return 0;
}

// The phases, which barriers divide, in which each head is written and read.
struct Turns {
  std::vector<int> written, read;
};

void Note(const Dispatch& dispatch, std::uint64_t tiles, std::uint64_t heads_a_kv_head, int phase,
          std::vector<int>& turns) {
  EXPECT(dispatch.first_head % heads_a_kv_head == 0 && dispatch.heads % heads_a_kv_head == 0);
  const std::uint64_t x = dispatch.groups[0], y = dispatch.groups[1];
  EXPECT(x * y >= tiles * dispatch.heads && x * (y - 1) < tiles * dispatch.heads);
  for (std::uint64_t i = 0; i < dispatch.heads / heads_a_kv_head; ++i) {
    const std::uint64_t head = dispatch.first_head / heads_a_kv_head + i;
    EXPECT(head < turns.size() && turns[head] < 0);
    turns[head] = phase;
  }
}

void CheckStored(const AttentionProblem& problem, const DeviceTraits& traits,
                 const DispatchPlan& plan) {
  const AttentionParams& params = plan.params;
  const std::uint64_t heads = std::uint64_t{params.kv_heads} * params.batch_count;
  const std::uint64_t group = params.query_heads / params.kv_heads;
  const std::uint64_t tile_heads = TileHeads(params), chunks = group / tile_heads;
  const std::uint64_t query_tiles = DivideUp(params.queries, kTileRows / tile_heads);
  const std::uint64_t key_tiles = DivideUp(params.keys, kTileRows);
  const std::uint64_t head_bytes = 2 * chunks * query_tiles * key_tiles * kTileRows * kTileRows;
  const std::uint64_t slots = params.score_gradient_heads;
  EXPECT(params.operand[OPERAND_SCORE_GRADIENTS].head_stride == head_bytes / 2);
  const std::uint64_t bytes = ScratchBytes(plan, OPERAND_SCORE_GRADIENTS);
  EXPECT(bytes >= slots * head_bytes && slots * head_bytes <= traits.max_score_gradient_bytes);

  // Heads wider than 128 have tiles of half the rows, and a kernel for each gradient.
  const bool is_wide = params.head_dim > 128;
  const std::uint64_t tile_rows = is_wide ? kTileRows / 2 : kTileRows;
  std::uint64_t kernels_of_values = 0;
  Turns turns = {std::vector<int>(heads, -1), std::vector<int>(heads, -1)};
  int phase = 0;
  for (const Dispatch& dispatch : plan.dispatches) {
    phase += dispatch.barrier_before;
    if (StartsWith(dispatch.shader, "attend_backward_dkv_coopmat")) {
      const std::uint32_t features = dispatch.specialization[2];
      EXPECT(dispatch.specialization[4] == tile_rows);
      if (is_wide && !(features & FEATURE_DK)) {
        EXPECT((features & FEATURE_DV) && !(features & FEATURE_SCORE_GRADIENTS));
        kernels_of_values += dispatch.heads;
        continue;
      }
      EXPECT((features & FEATURE_SCORE_GRADIENTS) && is_wide == !(features & FEATURE_DV));
      Note(dispatch, DivideUp(params.keys, tile_rows), 1, phase, turns.written);
    } else if (StartsWith(dispatch.shader, "attend_backward_dq_stored_coopmat")) {
      EXPECT(dispatch.specialization[4] == tile_rows);
      const std::uint64_t tiles = DivideUp(params.queries, tile_rows / tile_heads);
      Note(dispatch, tiles, chunks, phase, turns.read);
    }
  }
  EXPECT(kernels_of_values == (is_wide ? heads : 0));
  for (std::uint64_t head = 0; head < heads; ++head) {
    EXPECT(turns.written[head] > 0 && turns.read[head] > turns.written[head]);
    if (head + slots < heads) EXPECT(turns.written[head + slots] > turns.read[head]);
  }
}

}  // namespace

void FuzzStoredGradients() {
  Random random(4);
  std::map<bool, int> seen;  // by whether heads take turns
  for (round = 0; round < kRounds; ++round) {
    const AttentionProblem problem = RandomBackward(random);
    DeviceTraits traits;
    traits.min_subgroup_size = traits.max_subgroup_size = traits.subgroup_size = 32;
    traits.max_shared_memory = Pick(random, {40960, 45056, 49152});
    traits.max_workgroup_invocations = Pick(random, {128, 256, 1024});
    traits.storage_16bit = traits.coopmat_float16 = traits.coopmat_bfloat16 = true;
    traits.coopmat_layout_known = Chance(random);
    traits.coopmat_relays = !traits.coopmat_layout_known;
    traits.max_score_gradient_bytes = std::uint64_t{1} << Pick(random, {10, 20, 24, 28, 32});
    const DispatchPlan plan = PlanAttention(problem, traits);
    const bool has_room =
        traits.max_shared_memory == 49152 && traits.max_workgroup_invocations > 128;
    EXPECT(!has_room || std::strcmp(plan.path, "coopmat") == 0);
    const bool stores = plan.params.score_gradient_heads > 0;
    EXPECT(stores == (ScratchBytes(plan, OPERAND_SCORE_GRADIENTS) > 0));
    if (!stores) continue;
    CheckStored(problem, traits, plan);
    ++seen[plan.params.score_gradient_heads < problem.params.kv_heads * problem.params.batch_count];
  }
  EXPECT(seen[false] > 100 && seen[true] > 100);
}

}  // namespace jax_aat
