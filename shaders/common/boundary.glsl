// What the conditions of a call let each query tile of a plan see of each granule: the twin of
// jax_aat/boundary.py, without mask and bias.
#include "common/levels.glsl"
#include "common/visibility.glsl"

struct Boundary {
  bool seen;         // a row may see a key of the granule; a few may be listed though none does
  bool whole;        // every row sees every key
  bool super_whole;  // and every key of the granule's super-tile, as far as its keys count
  bool full;         // every row sees every key, rows past the query length included
};

// The smallest and the largest id of a segment in each granule, super-tile and query tile, in this
// order (segment_ranges.comp).
ivec2 segment_range(uint index) {
  return ivec2(Pairs(view_of(OPERAND_SEGMENT_RANGES, 0, 2).base).pair[index]);
}

// The granules that a tile may see any of, as far as segments do not decide: from the first to before
// the second. After `set_visibility`.
uvec2 seen_granules(uint tile) {
  uint first = tile * PARAMS.plan_positions;
  uint last = min(first + PARAMS.plan_positions, query_limit) - 1;
  uint first_key = 0, end_key = first < query_limit ? key_limit : 0;
  if (has(FEATURE_CAUSAL)) end_key = min(end_key, last + 1);
  if (has(FEATURE_WINDOW)) {
    if (call.window_left >= 0) first_key = first - min(first, uint(call.window_left));
    if (call.window_right >= 0) end_key = min(end_key, last + uint(call.window_right) + 1);
  }
  uint end = divide_up(end_key, GRANULE_ROWS);
  return uvec2(min(first_key / GRANULE_ROWS, end), end);
}

// Of a tile and a granule that exist, after `set_visibility`.
Boundary boundary_of(uint tile, uint granule) {
  uint super_tile = granule / SUPER_TILE_GRANULES;
  int first = int(tile * PARAMS.plan_positions);
  int last = min(first + int(PARAMS.plan_positions), int(call.queries)) - 1;
  int valid_last = min(last, int(query_limit) - 1);
  int start = int(granule * GRANULE_ROWS);
  int stop = min(start + GRANULE_ROWS, int(call.keys)) - 1;
  int super_start = int(super_tile * SUPER_TILE_ROWS);
  int super_stop = min(super_start + int(SUPER_TILE_ROWS), int(key_limit)) - 1;

  Boundary found;
  found.seen = first < int(query_limit) && start < int(key_limit);
  found.full = last < int(query_limit);
  found.whole = stop < int(key_limit);
  found.super_whole = true;
  bool causal = has(FEATURE_CAUSAL), windowed = has(FEATURE_WINDOW);
  if (causal || (windowed && call.window_right >= 0)) {
    int right = causal ? 0 : call.window_right;
    found.seen = found.seen && start - valid_last <= right;
    found.whole = found.whole && stop - first <= right;
    found.super_whole = super_stop - first <= right;
  }
  if (windowed && call.window_left >= 0) {
    int left = call.window_left;
    found.seen = found.seen && first - stop <= left;
    found.full = found.full && last - start <= left;
    found.whole = found.whole && valid_last - start <= left;
    found.super_whole = found.super_whole && valid_last - super_start <= left;
  }
  if (has(FEATURE_SEGMENTS)) {
    ivec2 ids = segment_range(PARAMS.coarse_rows + tile);
    ivec2 key_ids = segment_range(granule);
    ivec2 super_ids = segment_range(granule_count() + super_tile);
    found.seen = found.seen && ids.x <= key_ids.y && key_ids.x <= ids.y;
    found.whole = found.whole && ids.x == ids.y && key_ids == ids;
    found.super_whole = found.super_whole && super_ids == ids.xx;
  }
  found.super_whole = found.super_whole && found.whole;
  found.full = found.full && found.whole;
  return found;
}

// Whether every row of a tile sees every key of these granules of a key tile. Where the tile sees
// their super-tile, which is nearly always, the first tells of all; keys past the length are none of
// it.
bool is_all_seen(uint tile, uint first, uint end) {
  return end * GRANULE_ROWS <= key_limit && boundary_of(tile, first).super_whole;
}
