// Scores of coarse rows in the *_coopmat kernels that own a tile of queries.
#include "common/coopmat_query_tile.glsl"

// The coarse rows in a lane's columns of 16 rows of a block.
struct CoarseColumns {
  uint row[LANE_COLUMNS];
  float log2_count[LANE_COLUMNS];
  bool super_mean[LANE_COLUMNS];  // level 2
};

CoarseColumns load_coarse_columns(Walk walk, QueryTile tile, uint block, uint granule) {
  uint first = block * BLOCK_ROWS + granule * GRANULE_ROWS;
  CoarseColumns columns;
  [[unroll]] for (uint c = 0; c < LANE_COLUMNS; ++c) {
    uint number = first + lane_column(c);
    uint entry = walk.entries.entry[walk.first_entry + number];
    uint row = bitfieldExtract(entry, 0, COARSE_ROW_BITS);
    bool exists = number < tile.list.coarse_rows && row < PARAMS.coarse_rows;
    columns.row[c] = exists ? row : ABSENT;
    columns.log2_count[c] = log2(float((entry >> COARSE_ROW_BITS) + 1));
    columns.super_mean[c] = level_index(row) != 0;
  }
  return columns;
}

LaneScore coarse_column_score(float product, uint position, uint head, CoarseColumns columns,
                              uint c, vec2 level_bias) {
  if (columns.row[c] == ABSENT) return LaneScore(-INFINITY, 1.0);
  float bias = columns.super_mean[c] ? level_bias.y : level_bias.x;
  return coarse_lane_score(product, position, head, columns.row[c],
                           fma(bias, LOG2_E, columns.log2_count[c]));
}

// The number of a level among two.
vec2 at_level(bool super_mean, float value) {
  return super_mean ? vec2(0, value) : vec2(value, 0);
}

// Row r of those that a lane holds elements of.
uint held_row(uint r) { return subgroup_row(r / LANE_ROWS) + lane_row(r % LANE_ROWS); }

// Two values of that row, one a level. Rows that do not exist repeat the last one.
vec2 load_levels_pair(uint slot, bool given, QueryTile tile, uint r) {
  if (!given) return vec2(0);
  View view = view_of(slot, tile.first_head, 2);
  uint row = held_row(r);
  uint position = min(tile.first_position + row / TILE_HEADS, PARAMS.queries - 1);
  uint start = row_start(view, position, row % TILE_HEADS);
  return vec2(load_float(view.base, start), load_float(view.base, start + 1));
}

// Sums over the lanes that share the row, and stores.
void store_levels_pair(uint slot, QueryTile tile, uint r, vec2 value) {
  value = vec2(quad_sum(value.x), quad_sum(value.y));
  uint row = held_row(r), position = tile.first_position + row / TILE_HEADS;
  if (position >= PARAMS.queries || gl_SubgroupInvocationID % 4 != 0) return;
  View view = view_of(slot, tile.first_head, 2);
  uint start = row_start(view, position, row % TILE_HEADS);
  Words(view.base).word[start] = floatBitsToUint(value.x);
  Words(view.base).word[start + 1] = floatBitsToUint(value.y);
}
