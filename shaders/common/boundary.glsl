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

// The same, as far as segments do not decide: from which granule on, and before which.
struct TileBoundary {
  uvec2 seen, whole, super_whole, full;
};

// The same of the granules of a word of levels: the lower bits of their fields.
struct WordBoundary {
  uint seen, whole, super_whole, full;
};

uvec2 common_range(uvec2 a, uvec2 b) { return uvec2(max(a.x, b.x), min(a.y, b.y)); }
bool is_in(uint granule, uvec2 range) { return granule >= range.x && granule < range.y; }

// The first part of `size` keys that starts at the key or behind it; keys below 0 are as 0.
uint next_part(int key, uint size) { return divide_up(uint(max(key, 0)), size); }

// Of a tile that exists, after `set_visibility`.
TileBoundary boundary_of_tile(uint tile) {
  const int FAR = (1 << 30) - 1;  // no two positions are further apart, and sums stay in range
  const uvec2 NONE = uvec2(0);
  int first = int(tile * PARAMS.plan_positions);
  int last = min(first + int(PARAMS.plan_positions), int(call.queries)) - 1;
  int valid_last = min(last, int(query_limit) - 1);
  int keys = int(call.keys), valid_keys = int(key_limit);
  uint granules = granule_count();

  // A row sees the keys from `left` before it to `right` behind it.
  int left = FAR, right = FAR;
  if (has(FEATURE_WINDOW) && call.window_left >= 0) left = min(call.window_left, FAR);
  if (has(FEATURE_WINDOW) && call.window_right >= 0) right = min(call.window_right, FAR);
  if (has(FEATURE_CAUSAL)) right = 0;
  // Keys that some rows see, and that all see.
  int some_first = max(first - left, 0), some_end = min(valid_last + right + 1, valid_keys);
  int all_first = valid_last - left, all_end = min(first + right + 1, valid_keys);

  TileBoundary found;
  found.seen = uvec2(uint(some_first) / GRANULE_ROWS, next_part(some_end, GRANULE_ROWS));
  if (first >= int(query_limit) || some_first >= keys) found.seen = NONE;
  found.seen.x = min(found.seen.x, found.seen.y);
  // The last granule and the last super-tile may be short.
  uint all_end_granule = all_end >= keys ? granules : uint(max(all_end, 0)) / GRANULE_ROWS;
  found.whole = uvec2(next_part(all_first, GRANULE_ROWS), all_end_granule);
  uint super_end = all_end >= valid_keys ? granules
                                         : uint(max(all_end, 0)) / SUPER_TILE_ROWS * SUPER_TILE_GRANULES;
  uint super_first = next_part(all_first, SUPER_TILE_ROWS) * SUPER_TILE_GRANULES;
  found.super_whole = common_range(found.whole, uvec2(super_first, super_end));
  found.full = common_range(found.whole, uvec2(next_part(last - left, GRANULE_ROWS), granules));
  if (last >= int(query_limit)) found.full = NONE;
  return found;
}

// The smallest and the largest id of a segment in each granule, super-tile and query tile, in this
// order (segment_ranges.comp).
ivec2 segment_range(uint index) {
  return ivec2(Pairs(view_of(OPERAND_SEGMENT_RANGES, 0, 2).base).pair[index]);
}

Boundary boundary_of(TileBoundary bounds, uint tile, uint granule) {
  Boundary found = Boundary(is_in(granule, bounds.seen), is_in(granule, bounds.whole),
                            is_in(granule, bounds.super_whole), is_in(granule, bounds.full));
  if (has(FEATURE_SEGMENTS)) {
    ivec2 ids = segment_range(PARAMS.coarse_rows + tile);
    ivec2 key_ids = segment_range(granule);
    ivec2 super_ids = segment_range(granule_count() + granule / SUPER_TILE_GRANULES);
    bool one = ids.x == ids.y && key_ids == ids;
    found.seen = found.seen && ids.x <= key_ids.y && key_ids.x <= ids.y;
    found.whole = found.whole && one;
    found.super_whole = found.super_whole && one && super_ids == ids;
    found.full = found.full && one;
  }
  return found;
}

// Of the granules from `first` on, which a word of levels starts with.
WordBoundary boundary_of_word(TileBoundary bounds, uint tile, uint first) {
  WordBoundary found = WordBoundary(fields_in(bounds.seen, first), fields_in(bounds.whole, first),
                                    fields_in(bounds.super_whole, first),
                                    fields_in(bounds.full, first));
  if (has(FEATURE_SEGMENTS)) {
    for (uint left = found.seen; left != 0; left &= left - 1) {
      uint field = left & -left;
      Boundary granule = boundary_of(bounds, tile, first + findLSB(field) / 2);
      if (!granule.seen) found.seen &= ~field;
      if (!granule.whole) found.whole &= ~field;
      if (!granule.super_whole) found.super_whole &= ~field;
      if (!granule.full) found.full &= ~field;
    }
  }
  return found;
}

// Whether every row of a tile sees every key of these granules, all of one super-tile. Where the tile
// sees their super-tile, which is nearly always, the first tells of all.
bool is_all_seen(TileBoundary bounds, uint tile, uint first, uint end) {
  return end <= bounds.super_whole.y && boundary_of(bounds, tile, first).super_whole;
}
