// The query tile of a *_coopmat kernel: its rows in and out, and the walk over the keys on its work
// list.
#include "common/coopmat_rounding.glsl"
#include "common/coopmat_rows.glsl"
#include "common/coopmat_scores.glsl"
#include "common/query_tile.glsl"

const uint ROWS = ROW_TILES * LANE_ROWS;  // of the tile, that a lane holds elements of

// Rows that do not exist repeat the last one and are not stored.
void exchange_in(View view, QueryTile tile, uint t, bool negate) {
  [[unroll]] for (uint n = 0; n < EXCHANGES; ++n) {
    uint row = subgroup_row(t) + exchange_row(n);
    uint position = min(tile.first_position + row / TILE_HEADS, PARAMS.queries - 1);
    uvec4 value = load_vector(view, row_start(view, position, row % TILE_HEADS), exchange_column());
    if (negate) value ^= 0x80008000u;
    if (is_staged(exchange_column())) staged[exchange_at(n)] = value;
  }
}

void exchange_out(View view, QueryTile tile, uint t) {
  [[unroll]] for (uint n = 0; n < EXCHANGES; ++n) {
    uint row = subgroup_row(t) + exchange_row(n);
    uint position = tile.first_position + row / TILE_HEADS;
    if (position < PARAMS.queries && holds_data(exchange_column())) {
      uint start = row_start(view, position, row % TILE_HEADS);
      Quads(view.base).quad[start / 8 + exchange_column()] = staged[exchange_at(n)];
    }
  }
}

// Stores sums of the subgroup's rows, times a factor.
void store_sums(View view, QueryTile tile, Accumulator sums[ROW_TILES][DIM_TILES], float factor) {
  [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      to_known(sums[t][d]);
      [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; ++i) {
        sums[t][d][i] = rounded(sums[t][d][i] * factor);
      }
      store_matrix(sums[t][d], exchange_start() + 2 * d);
    }
    barrier();
    exchange_out(view, tile, t);
    barrier();
  }
}

// locate_query_tile, with everything in uniform registers.
bool locate_uniform_tile(uint place, out QueryTile tile) {
  QueryTile found;
  if (subgroupAny(!locate_query_tile(place, found))) return false;
  tile = QueryTile(subgroupBroadcastFirst(found.first_position),
                   subgroupBroadcastFirst(found.first_head),
                   subgroupBroadcastFirst(found.kv_head), uniform_list(found.list));
  return true;
}

// Over the keys on the work list, or the coarse rows after them.
struct Walk {
  Entries entries;
  uint first_entry;
  uint full_blocks;
  uint blocks;
  uint last_key;  // that is visible; or the last coarse row
  Source keys;
  Source values;
  bool coarse;  // known at compile time
};

void name_block(Walk walk, uint block) {
  block = min(block, walk.blocks - 1);
  if (walk.coarse) {
    name_coarse_rows(walk.entries, walk.first_entry + block * BLOCK_ROWS);
  } else {
    name_granules(walk.entries, walk.first_entry + block * BLOCK_GRANULES);
  }
}

void fetch_rows(Walk walk, uint held, Source source) {
  if (walk.coarse) {
    fetch_coarse_rows(held, source, walk.last_key);
  } else {
    fetch_keys(held, source, walk.last_key);
  }
}

void fetch_block(Walk walk, uint operand) {
  fetch_rows(walk, operand, operand == 0 ? walk.keys : walk.values);
}

void stage_first_block(Walk walk) {
  if (walk.blocks > 0) {
    name_block(walk, 0);
    fetch_block(walk, 0);
    stage_rows(0, 0);
    fetch_block(walk, 1);
    stage_rows(0, 1);
    name_block(walk, 1);
  }
  barrier();
}

Walk listed_walk(QueryTile tile) {
  Walk walk;
  walk.entries = Entries(tile.list.entries);
  walk.first_entry = tile.list.first_entry;
  // Transformed scores are evaluated one by one in every block.
  walk.full_blocks = TRANSFORMED ? 0 : tile.list.full_blocks;
  walk.blocks = tile.list.blocks;
  walk.last_key = subgroupBroadcastFirst(max(key_limit, 1) - 1);
  walk.keys = source_of(view_of(OPERAND_K, tile.kv_head, 1));
  walk.values = source_of(view_of(OPERAND_V, tile.kv_head, 1));
  walk.coarse = false;
  return walk;
}

Walk start_walk(QueryTile tile) {
  Walk walk = listed_walk(tile);
  stage_first_block(walk);
  return walk;
}

Walk coarse_walk(QueryTile tile) {
  Walk walk;
  walk.entries = Entries(tile.list.entries);
  walk.first_entry = tile.list.first_coarse_entry;
  walk.full_blocks = 0;
  walk.blocks = divide_up(tile.list.coarse_rows, BLOCK_ROWS);
  walk.last_key = subgroupBroadcastFirst(PARAMS.coarse_rows - 1);
  walk.keys = source_of(view_of(OPERAND_COARSE_K, tile.kv_head, 1));
  walk.values = source_of(view_of(OPERAND_COARSE_V, tile.kv_head, 1));
  walk.coarse = true;
  return walk;
}

Walk start_coarse_walk(QueryTile tile) {
  Walk walk = coarse_walk(tile);
  stage_first_block(walk);
  return walk;
}

// A step works on one block, in parts of some granules. Keys of the next block are fetched during
// its first half, values during the second. After the last block the next one is that block again:
// one more fetch costs less than a branch around each.
void begin_step(Walk walk) { fetch_block(walk, 0); }

bool is_halfway(uint part, uint granules) {
  return part == BLOCK_GRANULES / granules / 2 * granules;
}

void continue_step(Walk walk, uint block) {
  stage_rows(block + 1, 0);
  fetch_block(walk, 1);
  name_block(walk, block + 2);
}

void end_step(uint block) {
  stage_rows(block + 1, 1);
  barrier();
}
