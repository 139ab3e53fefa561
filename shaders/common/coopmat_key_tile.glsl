// The tile of keys of a *_coopmat kernel: its rows in and out, and the walk over the queries on its
// transposed work list.
#include "common/coopmat_rows.glsl"
#include "common/coopmat_scores.glsl"
#include "common/launch_order.glsl"

struct KeyTile {
  uint first_key;
  uint kv_head;
  uvec4 list;  // header of what it sees
};

// Sets the batch entry too. False past the last tile. Everything lies in uniform registers.
bool locate_key_tile(out KeyTile tile) {
  uint tiles = divide_up(PARAMS.keys, TILE_ROWS), head, number;
  if (!launched_tile(PARAMS.batch_count * PARAMS.kv_heads, tiles, head, number)) return false;
  set_batch(head / PARAMS.kv_heads);
  uint kv_head = head % PARAMS.kv_heads;
  uint list = (batch_list() + kv_head * PARAMS.key_list_head_stride) * tiles + number;
  tile.first_key = subgroupBroadcastFirst(number * TILE_ROWS);
  tile.kv_head = subgroupBroadcastFirst(kv_head);
  tile.list = subgroupBroadcastFirst(list_header(OPERAND_KEY_LISTS, list));
  return true;
}

// Rows that do not exist repeat the last one and are not stored.
void exchange_in(View view, KeyTile tile, uint t, bool negate) {
  [[unroll]] for (uint n = 0; n < EXCHANGES; ++n) {
    uint key = min(tile.first_key + subgroup_row(t) + exchange_row(n), PARAMS.keys - 1);
    uvec4 value = load_vector(view, row_start(view, key, 0), exchange_column());
    if (negate) value ^= 0x80008000u;
    if (is_staged(exchange_column())) staged[exchange_at(n)] = value;
  }
}

void exchange_out(View view, KeyTile tile, uint t) {
  [[unroll]] for (uint n = 0; n < EXCHANGES; ++n) {
    uint key = tile.first_key + subgroup_row(t) + exchange_row(n);
    if (key < PARAMS.keys && holds_data(exchange_column())) {
      uint at = row_start(view, key, 0) / 8 + exchange_column();
      Quads(view.base).quad[at] = staged[exchange_at(n)];
    }
  }
}

// The list is walked once for each chunk of TILE_HEADS query heads; a step is one block of it.
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
};

// Of each staged query: (what its weights are relative to, delta).
shared vec2 staged_state[2 * BLOCK_ROWS];

// The step on its way; its state is kept as loaded, so that nothing waits for it before the end.
Step next;
uint next_state_granule;
vec2 next_state;

Step step_after(Step step, Walk walk) {
  bool wraps = step.block + 1 == walk.blocks;
  return Step(wraps ? 0 : step.block + 1, step.first_head + (wraps ? TILE_HEADS : 0));
}

bool holds_state() { return gl_LocalInvocationIndex < BLOCK_ROWS; }

void name_next(Walk walk) {
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
}

void stage_state(uint stage) {
  if (holds_state()) {
    staged_state[(stage & 1) * BLOCK_ROWS + gl_LocalInvocationIndex] =
        vec2(weight_reference(next_state.x), next_state.y);
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
  Step after = step_after(next, walk);
  if (after.first_head < walk.heads) next = after;
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
  walk.entries = Entries(subgroupBroadcastFirst(list_address(OPERAND_KEY_LISTS)));
  walk.first_entry = tile.list.x;
  // Transformed scores are evaluated one by one in every block.
  walk.full_blocks = TRANSFORMED ? 0 : tile.list.y;
  walk.blocks = tile.list.y + tile.list.z;
  walk.heads = subgroupBroadcastFirst(PARAMS.query_heads / PARAMS.kv_heads);
  walk.last_position = subgroupBroadcastFirst(query_limit - 1);
  uint first_head = tile.kv_head * walk.heads;
  walk.q = source_of(view_of(OPERAND_Q, first_head, 1));
  walk.dout = source_of(view_of(OPERAND_DOUT, first_head, 1));
  walk.logsumexp = uniform_view(view_of(OPERAND_LSE, first_head, 2));
  walk.delta = uniform_view(view_of(OPERAND_DELTA, first_head, 2));
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
