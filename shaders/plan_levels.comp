#version 460
// Levels of the granules of each query tile by their prices, and how many granules and coarse rows
// the tile's list will hold. A workgroup makes the levels of one tile.
//
// With previous levels and no causality, lengths or segments NVIDIA's compiler (driver 580.159.04, an
// H200) made 0 of the query and key limits that it kept in registers, which hid everything.
#define CALL_IN_MEMORY
#include "common/plan_tile.glsl"
#include "common/prices.glsl"

#define LEVEL_HIDDEN 3
// Hysteresis, as in jax_aat/router.py: multiplied by both, as a product is rounded alike everywhere.
const float MARGIN = 1.2;
const float INVERSE_MARGIN = 1.0 / 1.2;
const uint WORDS = THREADS / LEVEL_GRANULES;
const uint SUPER_TILES = THREADS / SUPER_TILE_GRANULES;
const uint KEY_TILES = THREADS / KEY_TILE_GRANULES;
const uint SUPER_TILE_WORDS = SUPER_TILE_GRANULES / LEVEL_GRANULES;

shared uint level_words[WORDS];  // of THREADS granules
// The place of each of their key tiles among those with prices, or NO_KEY_TILE.
shared uint priced[KEY_TILES];
shared uvec3 totals;  // full granules, those at level 0, coarse rows

// The upper half of a float32, of which those below 0 count as 0.
uint upper_half(float x) {
  uint bits = floatBitsToUint(x);
  return (bits >> 31) != 0 ? 0 : bits >> 16;
}

uint level_at(uint prices, uint price) {
  if ((prices >> 16) >= price) return LEVEL_EXACT;
  if (PARAMS.level_count == 1) return LEVEL_HIDDEN;
  return PARAMS.level_count == 3 && (prices & 0xffffu) < price ? LEVEL_SUPER_MEAN : LEVEL_MEAN;
}

// The nearest finer level that the boundary allows.
uint allowed_level(uint level, Boundary bounds) {
  if (!bounds.seen) return LEVEL_HIDDEN;
  if (!bounds.whole) return LEVEL_EXACT;
  return level == LEVEL_SUPER_MEAN && !bounds.super_whole ? LEVEL_MEAN : level;
}

// Finds the places of the key tiles from the one of granule `base` on.
void find_priced(View prices, uint row, uint base) {
  if (has_all_prices()) return;
  uint first = base / KEY_TILE_GRANULES;
  for (uint i = gl_LocalInvocationID.x; i < PARAMS.priced_key_tiles; i += THREADS) {
    // NO_KEY_TILE is past all.
    uint key_tile = load_word(prices.base, row + i) - first;
    if (key_tile < KEY_TILES) priced[key_tile] = i;
  }
  barrier();
}

// Both prices of a granule, once its key tile's place is found.
uint prices_at(View prices, uint row, uint granule) {
  if (has_all_prices()) return load_word(prices.base, row + granule);
  uint place = priced[granule / KEY_TILE_GRANULES % KEY_TILES];
  if (place == NO_KEY_TILE) {
    return price_of_other(load_word(prices.base, row + others_place(OTHERS_KEPT)) != 0);
  }
  place = place * KEY_TILE_GRANULES + granule % KEY_TILE_GRANULES;
  return load_word(prices.base, row + first_price() + place);
}

void main() {
  uint self = gl_LocalInvocationID.x;
  uint list, tile;
  if (!set_plan_tile(list, tile)) return;
  uint granules = granule_count();
  View prices = view_of(OPERAND_PRICES, list, 2);
  uint row = tile * prices.row_stride;
  View levels = levels_of(list, tile);
  View previous = view_of(OPERAND_PREVIOUS_LEVELS, list, 2);
  previous.base = add_wide(previous.base, multiply_wide(tile, previous.row_stride * 4));
  uint price = upper_half(load_float(view_of(OPERAND_LAMBDA, list, 2).base, 0));
  float value = uintBitsToFloat(price << 16);
  uint lower_price = upper_half(value * INVERSE_MARGIN), higher_price = upper_half(value * MARGIN);
  if (self == 0) totals = uvec3(0);

  uvec3 own = uvec3(0);
  for (uint base = 0; base < granules; base += THREADS) {
    barrier();
    if (self < WORDS) level_words[self] = 0;
    if (self < KEY_TILES) priced[self] = NO_KEY_TILE;
    barrier();
    find_priced(prices, row, base);
    uint granule = base + self;
    uint level = LEVEL_HIDDEN;
    if (granule < granules) {
      uint pair = prices_at(prices, row, granule);
      level = level_at(pair, price);
      if (has(FEATURE_PREVIOUS_LEVELS)) {
        uint before = granule_level(previous, granule);
        uint finer = level_at(pair, lower_price), coarser = level_at(pair, higher_price);
        if (before != LEVEL_HIDDEN) {
          level = clamp(before, min(finer, coarser), max(finer, coarser));
        }
      }
      Boundary bounds = boundary_of(tile, granule);
      level = allowed_level(level, bounds);
      if (level == LEVEL_EXACT) own += uvec3(bounds.full ? 1 : 0, 1, 0);
      if (level == LEVEL_MEAN) ++own.z;
    }
    atomicOr(level_words[self / LEVEL_GRANULES], level << (2 * (self % LEVEL_GRANULES)));
    barrier();
    uint word = base / LEVEL_GRANULES + self;
    if (self < WORDS && word < divide_up(granules, LEVEL_GRANULES)) {
      Words(levels.base).word[word] = level_words[self];
    }
    if (self < SUPER_TILES) {
      uint listed = 0;
      for (uint i = 0; i < SUPER_TILE_WORDS; ++i) {
        listed |= fields_at(level_words[self * SUPER_TILE_WORDS + i], LEVEL_SUPER_MEAN);
      }
      if (listed != 0) ++own.z;
    }
  }
  atomicAdd(totals.x, own.x);
  atomicAdd(totals.y, own.y);
  atomicAdd(totals.z, own.z);
  barrier();
  if (self == 0) {
    // Where its entries start is known once the tiles before are.
    Quads(view_of(OPERAND_LIST_HEADERS, list, 2).base).quad[tile] = uvec4(0, totals);
  }
}
