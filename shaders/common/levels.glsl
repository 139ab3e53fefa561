// The levels map of a plan, and the coarse rows that stand for many keys at once: the mean of each
// granule (level 1), then the mean of each super-tile (level 2).
#include "common/work_list.glsl"

#define LEVEL_EXACT 0
#define LEVEL_MEAN 1
#define LEVEL_SUPER_MEAN 2
#define LEVEL_GRANULES 16      // of a word of the map
const uint SUPER_TILE_ROWS = SUPER_TILE_GRANULES * GRANULE_ROWS;
#define PLAN_KEY_ROWS 128  // of a key tile: those of a transposed list
#define KEY_TILE_GRANULES (PLAN_KEY_ROWS / GRANULE_ROWS)

#define COARSE_ROW_BITS 20  // of an entry; above lies the number of keys less one

uint granule_count() { return divide_up(PARAMS.keys, GRANULE_ROWS); }
uint key_tile_count() { return divide_up(PARAMS.keys, PLAN_KEY_ROWS); }

// Index of a row's level in biases and shares: 0 for granules, 1 for super-tiles.
uint level_index(uint coarse_row) { return coarse_row < granule_count() ? 0 : 1; }

// The key whose bias the row takes.
uint first_key_of(uint coarse_row) {
  uint granules = granule_count();
  return coarse_row < granules
             ? coarse_row * GRANULE_ROWS
             : (coarse_row - granules) * SUPER_TILE_ROWS;
}

uint granule_keys(uint granule) {
  return min(GRANULE_ROWS, PARAMS.keys - granule * GRANULE_ROWS);
}

// Query heads of a query tile of the plan, whatever those of the kernel's tiles are.
uint plan_tile_heads() {
  uint group = PARAMS.query_heads / PARAMS.kv_heads;
  return min(group & (~group + 1), 16);
}

#define EVEN_BITS 0x55555555u

// Of the fields of a word those at a level, in their lower bits.
uint fields_at(uint word, uint level) {
  uint differing = word ^ (level * EVEN_BITS);
  return ~(differing | differing >> 1) & EVEN_BITS;
}

// The lower bits of the fields of granules before `end`, in the word that starts with granule `first`.
uint fields_before(uint end, uint first) {
  uint count = uint(clamp(int(end) - int(first), 0, LEVEL_GRANULES));
  return count == LEVEL_GRANULES ? EVEN_BITS : EVEN_BITS & ((1u << (2 * count)) - 1u);
}

uint fields_in(uvec2 range, uint first) {
  return fields_before(range.y, first) & ~fields_before(range.x, first);
}

// The words of one query tile; `list` is its head chunk.
View levels_of(uint list, uint tile) {
  View levels = view_of(OPERAND_LEVELS, list, 2);
  levels.base = add_wide(levels.base, multiply_wide(tile, levels.row_stride * 4));
  return levels;
}

uint granule_level(View levels, uint granule) {
  uint word = load_word(levels.base, granule / LEVEL_GRANULES);
  return (word >> (2 * (granule % LEVEL_GRANULES))) & 3u;
}

// Number of keys that a super-tile's mean stands for: those of its granules at level 2.
uint super_mean_keys(View levels, uint super_tile) {
  uint granules = granule_count();
  uint first = super_tile * SUPER_TILE_GRANULES;
  uint end = min(first + SUPER_TILE_GRANULES, granules);
  uint keys = 0;
  // Unrolled, so that no word waits for the one before it.
  [[unroll]] for (uint word = 0; word < SUPER_TILE_GRANULES / LEVEL_GRANULES; ++word) {
    uint granule = first + word * LEVEL_GRANULES;
    uint levels_of_word = load_word(levels.base, min(granule, granules - 1) / LEVEL_GRANULES);
    uint fields = fields_at(levels_of_word, LEVEL_SUPER_MEAN) & fields_before(end, granule);
    keys += bitCount(fields) * GRANULE_ROWS;
  }
  if (end == granules && granule_level(levels, granules - 1) == LEVEL_SUPER_MEAN) {
    keys -= GRANULE_ROWS - granule_keys(granules - 1);
  }
  return keys;
}

// Number of keys that a coarse row stands for as the tile sees it; 0: it does not.
uint coarse_row_keys(View levels, uint coarse_row) {
  uint granules = granule_count();
  if (coarse_row >= granules) return super_mean_keys(levels, coarse_row - granules);
  return granule_level(levels, coarse_row) == LEVEL_MEAN ? granule_keys(coarse_row) : 0;
}
