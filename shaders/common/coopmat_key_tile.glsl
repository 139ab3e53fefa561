// The tile of keys, or of coarse rows, of a *_coopmat kernel: its rows in and out, and the walk over
// the queries on its transposed work list.
#include "common/coopmat_rows.glsl"
#include "common/coopmat_scores.glsl"
#include "common/key_parts.glsl"
#include "common/launch_order.glsl"

const bool COARSE_TILE = (FEATURES & FEATURE_COARSE_TILE) != 0;

struct KeyTile {
  uint first_key;
  uint kv_head;
  WorkList list;  // what it sees
  PlanList plan;  // the same by a plan: a part of it
  uint part;
};

// Sets the batch entry too. False past the last tile. Everything lies in uniform registers.
bool locate_key_tile(out KeyTile tile) {
  uint head, number;
  if (!launched_tile(workgroup_index(), shares_of_head(), head, number)) return false;
  set_batch(head / PARAMS.kv_heads);
  uint kv_head = head % PARAMS.kv_heads;
  Share share = share_of_head(number);
  tile.part = subgroupBroadcastFirst(share.part);
  tile.first_key = subgroupBroadcastFirst(share.tile * TILE_ROWS);
  tile.kv_head = subgroupBroadcastFirst(kv_head);
  if (has(FEATURE_PLAN)) {
    PlanList plan = part_of(plan_list(kv_head, share.tile * TILE_ROWS), share);
    tile.plan = PlanList(subgroupBroadcastFirst(plan.entries),
                         subgroupBroadcastFirst(plan.first_entry),
                         subgroupBroadcastFirst(plan.count),
                         subgroupBroadcastFirst(plan.first_chunk));
  } else {
    tile.list = uniform_list(key_list(kv_head, share.tile));
  }
  return true;
}

// Rows that do not exist repeat the last one and are not stored.
void exchange_in(View view, KeyTile tile, uint t, bool negate) {
  [[unroll]] for (uint n = 0; n < EXCHANGES; ++n) {
    uint key = min(tile.first_key + subgroup_row(t) + exchange_row(n), tile_row_end() - 1);
    uvec4 value = load_vector(view, row_start(view, key, 0), exchange_column());
    if (negate) value ^= 0x80008000u;
    if (is_staged(exchange_column())) staged[exchange_at(n)] = value;
  }
}

void exchange_out(View view, KeyTile tile, uint t) {
  [[unroll]] for (uint n = 0; n < EXCHANGES; ++n) {
    uint key = tile.first_key + subgroup_row(t) + exchange_row(n);
    if (key < tile_row_end() && holds_data(exchange_column())) {
      uint at = row_start(view, key, 0) / 8 + exchange_column();
      Quads(view.base).quad[at] = staged[exchange_at(n)];
    }
  }
}

// The list is walked once for each chunk of TILE_HEADS query heads; a step is one block of it. That
// of a plan is walked once: its entries, query tiles of single chunks, are cut into blocks.
struct Step {
  uint block;
  uint first_head;  // of the chunk, counted from the first head of the group
};

struct Walk {
  Entries entries;
  uint first_entry;
  uint full_blocks;
  uint blocks;
  uint heads;
  uint last_position;  // that is visible
  Source q;
  Source dout;
  View logsumexp;
  View delta;
  // Of a plan, where `entries` are query tiles:
  View level_bias;
  View dshares;
  uint tile_blocks;  // of a query tile
  uint tile_count;   // query tiles of all chunks that share the key/value head
};

// Of each staged query: (what its weights are relative to, delta); for coarse rows so for each level,
// less what the level adds to the score and to dout . v.
const uint STATE_LEVELS = COARSE_TILE ? 2 : 1;
const uint LEVEL_STATES = 2 * BLOCK_ROWS;
shared vec2 staged_state[STATE_LEVELS * LEVEL_STATES];

// The step on its way; its state is kept as loaded, so that nothing waits for it before the end.
Step next;
uint next_state_granule;
vec2 next_state;
vec2 next_level_state[2];  // (level bias, dshares)

// A block of the walk of a plan.
struct ListedBlock {
  uint entry;  // the query tile
  uint first_position;
  uint first_head;
};

ListedBlock listed_block(Walk walk, uint block) {
  ListedBlock listed;
  listed.entry = walk.entries.entry[walk.first_entry + block / walk.tile_blocks];
  uint entry = min(listed.entry, walk.tile_count - 1);
  listed.first_head = entry / PARAMS.plan_tiles * TILE_HEADS;
  listed.first_position = entry % PARAMS.plan_tiles * PARAMS.plan_positions +
                          block % walk.tile_blocks * (BLOCK_ROWS / TILE_HEADS);
  return listed;
}

Step step_after(Step step, Walk walk) {
  bool wraps = step.block + 1 == walk.blocks;
  return Step(wraps ? 0 : step.block + 1, step.first_head + (wraps ? TILE_HEADS : 0));
}

bool holds_state() { return gl_LocalInvocationIndex < BLOCK_ROWS; }

void name_next(Walk walk) {
  if (has(FEATURE_PLAN)) {
    ListedBlock listed = listed_block(walk, next.block);
    next.first_head = listed.first_head;
    [[unroll]] for (uint n = 0; n < FETCHES; ++n) {
      next_granules[n] = listed.first_position + fetch_granule(n) * GRANULE_POSITIONS;
    }
    uint granule = min(gl_LocalInvocationIndex, BLOCK_ROWS - 1) / GRANULE_ROWS;
    next_state_granule = listed.first_position + granule * GRANULE_POSITIONS;
    return;
  }
  uint entry = walk.first_entry + next.block * BLOCK_GRANULES;
  name_granules(walk.entries, entry);
  if (holds_state()) {
    next_state_granule = walk.entries.entry[entry + gl_LocalInvocationIndex / GRANULE_ROWS];
  }
}

void fetch_state(Walk walk) {
  if (!holds_state()) return;
  uint row = gl_LocalInvocationIndex % GRANULE_ROWS, head = next.first_head + row % TILE_HEADS;
  uint position = min(next_state_granule + row / TILE_HEADS, walk.last_position);
  next_state.x = load_float(walk.logsumexp.base, row_start(walk.logsumexp, position, head));
  if (has(FEATURE_DK)) {
    next_state.y = load_float(walk.delta.base, row_start(walk.delta, position, head));
  }
  if (COARSE_TILE) {
    [[unroll]] for (uint level = 0; level < 2; ++level) {
      next_level_state[level] = vec2(0);
      if (has(FEATURE_LEVEL_BIAS)) {
        uint at = row_start(walk.level_bias, position, head) + level;
        next_level_state[level].x = load_float(walk.level_bias.base, at);
      }
      if (has(FEATURE_DSHARES)) {
        uint at = row_start(walk.dshares, position, head) + level;
        next_level_state[level].y = load_float(walk.dshares.base, at);
      }
    }
  }
}

void stage_state(uint stage) {
  if (holds_state()) {
    vec2 state = vec2(weight_reference(next_state.x), next_state.y);
    [[unroll]] for (uint level = 0; level < STATE_LEVELS; ++level) {
      staged_state[level * LEVEL_STATES + (stage & 1) * BLOCK_ROWS + gl_LocalInvocationIndex] =
          COARSE_TILE ? state - next_level_state[level] * vec2(LOG2_E, 1.0) : state;
    }
  }
}

// Rows of q for the next step are fetched during the first half of a step, those of dout during the
// second. The last step is followed by itself: one more fetch costs less than a branch around each.
void begin_step(Walk walk) {
  fetch_queries(0, walk.q, next.first_head, walk.last_position);
  fetch_state(walk);
}

void continue_step(Walk walk, uint step) {
  stage_rows(step + 1, 0);
  fetch_queries(1, walk.dout, next.first_head, walk.last_position);
  if (has(FEATURE_PLAN)) {
    next.block = min(next.block + 1, walk.blocks - 1);
  } else {
    Step after = step_after(next, walk);
    if (after.first_head < walk.heads) next = after;
  }
  name_next(walk);
}

void end_step(uint step) {
  stage_rows(step + 1, 1);
  stage_state(step + 1);
  barrier();
}

View uniform_view(View view) {
  return View(subgroupBroadcastFirst(view.base), subgroupBroadcastFirst(view.row_stride),
              subgroupBroadcastFirst(view.head_stride), 1);
}

// Stages the first step.
Walk start_walk(KeyTile tile) {
  Walk walk;
  if (has(FEATURE_PLAN)) {
    walk.entries = Entries(tile.plan.entries);
    walk.first_entry = tile.plan.first_entry;
    walk.tile_blocks = PARAMS.plan_positions * TILE_HEADS / BLOCK_ROWS;
    walk.tile_count = chunks_of_group() * PARAMS.plan_tiles;
    walk.blocks = tile.plan.count * walk.tile_blocks;
    walk.full_blocks = 0;
  } else {
    walk.entries = Entries(tile.list.entries);
    walk.first_entry = tile.list.first_entry;
    // Transformed scores are evaluated one by one in every block.
    walk.full_blocks = TRANSFORMED ? 0 : tile.list.full_blocks;
    walk.blocks = tile.list.blocks;
  }
  walk.heads = subgroupBroadcastFirst(PARAMS.query_heads / PARAMS.kv_heads);
  walk.last_position = subgroupBroadcastFirst(max(query_limit, 1) - 1);
  uint first_head = tile.kv_head * walk.heads;
  walk.q = source_of(view_of(OPERAND_Q, first_head, 1));
  walk.dout = source_of(view_of(OPERAND_DOUT, first_head, 1));
  walk.logsumexp = uniform_view(view_of(OPERAND_LSE, first_head, 2));
  walk.delta = uniform_view(view_of(OPERAND_DELTA, first_head, 2));
  if (COARSE_TILE) {
    walk.level_bias = uniform_view(view_of(OPERAND_LEVEL_BIAS, first_head, 2));
    walk.dshares = uniform_view(view_of(OPERAND_DSHARES, first_head, 2));
  }
  next = Step(0, 0);
  next_state = vec2(0);
  if (walk.blocks > 0) {
    name_next(walk);
    begin_step(walk);
    continue_step(walk, 1);
    end_step(1);
  }
  return walk;
}
