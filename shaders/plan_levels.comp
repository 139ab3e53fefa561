#version 460
// Levels of the granules of each query tile by their prices, and how many granules and coarse rows
// the tile's list will hold. A workgroup makes the levels of one tile.
//
// With previous levels and no causality, lengths or segments NVIDIA's compiler (driver 580.159.04, an
// H200) made 0 of the query and key limits that it kept in registers, which hid everything.
#define LIMITS_IN_MEMORY
#include "common/plan_tile.glsl"
#include "common/prices.glsl"

#define LEVEL_HIDDEN 3
// Hysteresis, as in jax_aat/router.py: multiplied by both, as a product is rounded alike everywhere.
const float MARGIN = 1.2;
const float INVERSE_MARGIN = 1.0 / 1.2;
const uint WORDS = 512;  // that are made at once
const uint KEY_TILES = WORDS * LEVEL_GRANULES / KEY_TILE_GRANULES;
const uint SUPER_TILE_WORDS = SUPER_TILE_GRANULES / LEVEL_GRANULES;

shared uint level_words[WORDS];
shared uint priced[KEY_TILES / 32];  // a bit for each key tile that has prices of its own
shared uvec3 totals;  // full granules, those at level 0, coarse rows

uint tile;
View prices, previous;
uint price_row, others_price;
uint price, lower_price, higher_price;  // lambda, and what hysteresis makes of it
uvec3 own = uvec3(0);  // of totals

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

// Of a granule, or of none, by both its prices; it is counted.
uint chosen_level(uint granule, uint pair) {
  if (granule >= granule_count()) return LEVEL_HIDDEN;
  uint level = level_at(pair, price);
  if (has(FEATURE_PREVIOUS_LEVELS)) {
    uint before = granule_level(previous, granule);
    uint finer = level_at(pair, lower_price), coarser = level_at(pair, higher_price);
    if (before != LEVEL_HIDDEN) level = clamp(before, min(finer, coarser), max(finer, coarser));
  }
  Boundary bounds = boundary_of(tile, granule);
  level = allowed_level(level, bounds);
  if (level == LEVEL_EXACT) own += uvec3(bounds.full ? 1 : 0, 1, 0);
  if (level == LEVEL_MEAN) ++own.z;
  return level;
}

void put_level(uint base, uint granule, uint level) {
  uint at = granule - base;
  atomicOr(level_words[at / LEVEL_GRANULES], level << (2 * (at % LEVEL_GRANULES)));
}

// The levels from granule `base` on, where all have prices.
void put_all(uint base, uint end) {
  for (uint granule = base + gl_LocalInvocationID.x; granule < end; granule += THREADS) {
    uint pair = granule < granule_count() ? load_word(prices.base, price_row + granule) : 0;
    put_level(base, granule, chosen_level(granule, pair));
  }
}

// The levels of the key tiles that have prices of their own, which are noted.
void put_priced(uint base, uint end) {
  for (uint i = gl_LocalInvocationID.x; i < price_count(); i += THREADS) {
    // NO_KEY_TILE is past all.
    uint key_tile = load_word(prices.base, price_row + i / KEY_TILE_GRANULES);
    if (key_tile < base / KEY_TILE_GRANULES || key_tile >= end / KEY_TILE_GRANULES) continue;
    if (i % KEY_TILE_GRANULES == 0) {
      uint at = key_tile - base / KEY_TILE_GRANULES;
      atomicOr(priced[at / 32], 1u << (at % 32));
    }
    uint granule = key_tile * KEY_TILE_GRANULES + i % KEY_TILE_GRANULES;
    uint pair = load_word(prices.base, price_row + first_price() + i);
    put_level(base, granule, chosen_level(granule, pair));
  }
}

// The levels of the others, whose prices are alike, and mostly what the tile sees of them, too.
void put_others(uint base, uint end) {
  uvec2 seen = seen_granules(tile);
  for (uint i = gl_LocalInvocationID.x; i < (end - base) / KEY_TILE_GRANULES; i += THREADS) {
    if ((priced[i / 32] >> (i % 32) & 1u) != 0) continue;
    uint first = base + i * KEY_TILE_GRANULES, next = first + KEY_TILE_GRANULES;
    uint level = level_at(others_price, price), levels = 0;
    if (next <= seen.x || first >= seen.y) {
      levels = LEVEL_HIDDEN * EVEN_BITS;
    } else if (!has(FEATURE_PREVIOUS_LEVELS) && level != LEVEL_EXACT &&
               is_all_seen(tile, first, next)) {
      levels = level * EVEN_BITS;
      if (level == LEVEL_MEAN) own.z += KEY_TILE_GRANULES;
    } else {
      for (uint j = 0; j < KEY_TILE_GRANULES; ++j) {
        levels |= chosen_level(first + j, others_price) << (2 * j);
      }
    }
    const uint bits = 2 * KEY_TILE_GRANULES;
    atomicOr(level_words[i * bits / 32], (levels & ((1u << bits) - 1)) << (i * bits % 32));
  }
}

void main() {
  uint self = gl_LocalInvocationID.x;
  uint list;
  if (!set_plan_tile(list, tile)) return;
  prices = view_of(OPERAND_PRICES, list, 2);
  price_row = tile * prices.row_stride;
  View levels = levels_of(list, tile);
  previous = view_of(OPERAND_PREVIOUS_LEVELS, list, 2);
  previous.base = add_wide(previous.base, multiply_wide(tile, previous.row_stride * 4));
  price = upper_half(load_float(view_of(OPERAND_LAMBDA, list, 2).base, 0));
  float value = uintBitsToFloat(price << 16);
  lower_price = upper_half(value * INVERSE_MARGIN);
  higher_price = upper_half(value * MARGIN);
  if (!has_all_prices()) {
    others_price = price_of_other(load_word(prices.base, price_row + others_place(OTHERS_KEPT)) != 0);
  }
  if (self == 0) totals = uvec3(0);

  uint all_words = divide_up(granule_count(), LEVEL_GRANULES);
  for (uint first_word = 0; first_word < all_words; first_word += WORDS) {
    uint words = min(WORDS, all_words - first_word);
    uint base = first_word * LEVEL_GRANULES, end = base + words * LEVEL_GRANULES;
    barrier();
    for (uint i = self; i < words; i += THREADS) level_words[i] = 0;
    for (uint i = self; i < KEY_TILES / 32; i += THREADS) priced[i] = 0;
    barrier();
    if (has_all_prices()) {
      put_all(base, end);
    } else {
      put_priced(base, end);
      barrier();
      put_others(base, end);
    }
    barrier();
    for (uint i = self; i < words; i += THREADS) {
      Words(levels.base).word[first_word + i] = level_words[i];
    }
    for (uint i = self * SUPER_TILE_WORDS; i < words; i += THREADS * SUPER_TILE_WORDS) {
      uint listed = 0;
      for (uint j = i; j < min(i + SUPER_TILE_WORDS, words); ++j) {
        listed |= fields_at(level_words[j], LEVEL_SUPER_MEAN);
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
