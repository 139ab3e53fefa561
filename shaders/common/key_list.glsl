// The transposed lists of a plan: for each PLAN_KEY_ROWS keys, then for as many coarse rows, the query
// tiles that see any of them. Which of the rows a query tile sees says the levels map.
#include "common/elementary.glsl"
#include "common/levels.glsl"

// Keys, or coarse rows, that tiles are cut from.
uint tile_row_end() { return has(FEATURE_COARSE_TILE) ? PARAMS.coarse_rows : PARAMS.keys; }

uint chunks_of_group() { return PARAMS.query_heads / PARAMS.kv_heads / TILE_HEADS; }

struct PlanList {
  uvec2 entries;
  uint first_entry;
  uint count;
  uint first_chunk;  // of the key/value head
};

// What a plan's headers hold is bounded, as it comes from outside.
PlanList plan_list(uint kv_head, uint first_row) {
  uint tile = first_row / PLAN_KEY_ROWS;
  if (has(FEATURE_COARSE_TILE)) tile += key_tile_count();
  uvec4 header = list_header(OPERAND_KEY_LIST_HEADERS, kv_head, tile);
  uint first = min(header.x, PARAMS.key_list_capacity);
  uint count = min(header.y, min(PARAMS.key_list_capacity - first,
                                 chunks_of_group() * PARAMS.plan_tiles));
  return PlanList(view_of(OPERAND_KEY_LIST_ENTRIES, kv_head, 2).base, first, count,
                  kv_head * chunks_of_group());
}

struct ListedTile {
  bool exists;
  uint chunk;   // of query heads, counted from the first of the group
  uint number;  // along the queries
  View levels;
};

ListedTile listed_tile(PlanList list, uint index) {
  uint entry = load_word(list.entries, list.first_entry + index);
  ListedTile tile;
  tile.exists = entry < chunks_of_group() * PARAMS.plan_tiles;
  if (tile.exists) {
    tile.chunk = entry / PARAMS.plan_tiles;
    tile.number = entry % PARAMS.plan_tiles;
    tile.levels = levels_of(list.first_chunk + tile.chunk, tile.number);
  }
  return tile;
}

// What is added to the scores of a key or coarse row in the tile; -inf where the row is not seen.
float score_offset(uint row, ListedTile tile) {
  if (has(FEATURE_COARSE_TILE)) {
    uint keys = coarse_row_keys(tile.levels, row);
    return keys == 0 ? -INFINITY : log_accurate(float(keys));
  }
  return granule_level(tile.levels, row / GRANULE_ROWS) == LEVEL_EXACT ? 0.0 : -INFINITY;
}
