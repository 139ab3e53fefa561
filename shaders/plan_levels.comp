#version 460
// Levels of the granules of each query tile by their prices, and how many granules and coarse rows
// the tile's list will hold. A workgroup makes the levels of one tile.
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

// What the previous levels of a word make of the level that is wanted of all its granules: fields.
uint with_hysteresis(uint before, uint pair, uint level) {
  uint finer = level_at(pair, lower_price), coarser = level_at(pair, higher_price);
  uint levels = fields_at(before, LEVEL_HIDDEN) * level;
  for (uint kept = LEVEL_EXACT; kept <= LEVEL_SUPER_MEAN; ++kept) {
    levels |= fields_at(before, kept) * clamp(kept, min(finer, coarser), max(finer, coarser));
  }
  return levels;
}

// Of a granule that exists, by both its prices, whatever the boundary allows.
uint wanted_level(uint granule, uint pair) {
  uint level = level_at(pair, price);
  if (!has(FEATURE_PREVIOUS_LEVELS)) return level;
  return with_hysteresis(granule_level(previous, granule), pair, level) & 3u;
}

void put_level(uint base, uint granule, uint level) {
  uint at = granule - base;
  atomicOr(level_words[at / LEVEL_GRANULES], level << (2 * (at % LEVEL_GRANULES)));
}

// The levels wanted of granules from `base` on, where all have prices.
void put_all(uint base, uint end) {
  for (uint granule = base + gl_LocalInvocationID.x; granule < min(end, granule_count());
       granule += THREADS) {
    uint pair = load_word(prices.base, price_row + granule);
    put_level(base, granule, wanted_level(granule, pair));
  }
}

// Those of the key tiles that have prices of their own, which are noted.
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
    if (granule < granule_count()) put_level(base, granule, wanted_level(granule, pair));
  }
}

// Those of the others, whose prices are alike.
void put_others(uint base, uint end) {
  uint level = level_at(others_price, price);
  for (uint i = gl_LocalInvocationID.x; i < (end - base) / KEY_TILE_GRANULES; i += THREADS) {
    if ((priced[i / 32] >> (i % 32) & 1u) != 0) continue;
    uint word = i * KEY_TILE_GRANULES / LEVEL_GRANULES;
    uint levels = level * EVEN_BITS;
    if (has(FEATURE_PREVIOUS_LEVELS)) {
      uint before = load_word(previous.base, base / LEVEL_GRANULES + word);
      levels = with_hysteresis(before, others_price, level);
    }
    const uint bits = 2 * KEY_TILE_GRANULES;
    atomicOr(level_words[word], levels & (((1u << bits) - 1) << (i * bits % 32)));
  }
}

// The wanted levels of a word's granules where the boundary allows them, else the nearest finer ones,
// which are counted.
uint allowed_levels(uint wanted, WordBoundary allows) {
  uint mean = fields_at(wanted, LEVEL_MEAN), super_mean = fields_at(wanted, LEVEL_SUPER_MEAN);
  uint whole = allows.seen & allows.whole;
  mean = (mean | (super_mean & ~allows.super_whole)) & whole;
  super_mean &= allows.super_whole & whole;
  uint hidden = (fields_at(wanted, LEVEL_HIDDEN) & whole) | (EVEN_BITS & ~allows.seen);
  uint exact = EVEN_BITS & ~(mean | super_mean | hidden);
  own += uvec3(bitCount(exact & allows.full), bitCount(exact), bitCount(mean));
  return LEVEL_MEAN * mean | LEVEL_SUPER_MEAN * super_mean | LEVEL_HIDDEN * hidden;
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
      WordBoundary allows = boundary_of_word(bounds, tile, base + i * LEVEL_GRANULES);
      level_words[i] = allowed_levels(level_words[i], allows);
      Words(levels.base).word[first_word + i] = level_words[i];
    }
    barrier();
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
