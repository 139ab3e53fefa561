#version 460
// The router: what it costs each tile of queries to see each granule coarsely. A workgroup takes one
// tile after another, the longest first, and writes two prices a granule: those at which it stops
// being exact, and at which it stops having a row of its own (jax_aat/router.py, scores.py).
// Products are float32 sums of a thread.
#define HALF_PRODUCTS 0
#include "common/router.glsl"

// Columns of sub-queries pass through shared memory by slices, [quad][sub-query] (mean, mean square).
const uint STAGED_PAIRS = 256;

shared vec4 staged[2 * STAGED_PAIRS];

const uint SLICE = QUADS < STAGED_PAIRS / SUBS ? QUADS : STAGED_PAIRS / SUBS;
const uint FINE_SLICE = QUADS < STAGED_PAIRS / FINE_SUBS ? QUADS : STAGED_PAIRS / FINE_SUBS;
// Finer sub-queries that a thread of stage 2 takes at once, and threads that share a candidate.
const uint TAKEN = FINE_SUBS < 8 ? FINE_SUBS : 8;
const uint TAKERS = FINE_SUBS / TAKEN;

void put_sub_query(bool fine, uint sub, uint quad, vec4 mean, vec4 square) {
  uint place = fine ? SUBS * QUADS * 2 + (quad * FINE_SUBS + sub) * 2 : (quad * SUBS + sub) * 2;
  slab.queries.vector[place] = mean;
  slab.queries.vector[place + 1] = square;
}

// Copies the slice of quads [first, end) of `subs` sub-queries, the first of which lies at `place`.
void stage_sub_queries(SharedVectors vectors, uint place, uint subs, uint first, uint end) {
  barrier();
  for (uint i = gl_LocalInvocationID.x; i < (end - first) * subs * 2; i += THREADS) {
    staged[i] = vectors.vector[place + first * subs * 2 + i];
  }
  barrier();
}

// Products of the staged quads [first, end) with a row of means and one of variances, `stride` apart.
void add_products(inout float logit[SUBS], inout float variance[SUBS], uint place, uint stride,
                  bool with_variance, uint quads) {
  for (uint quad = 0; quad < quads; ++quad) {
    vec4 mean = summaries.vector[place + quad * stride];
    vec4 spread = with_variance ? summaries.vector[place + quad * stride + 1] : vec4(0);
    [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) {
      logit[sub] += dot(mean, staged[(quad * SUBS + sub) * 2]);
      if (with_variance) variance[sub] += dot(spread, staged[(quad * SUBS + sub) * 2 + 1]);
    }
  }
}

// Of super-tiles, or of key tiles, of so many granules.
void score_parts(Tile tile, bool key_tiles, uint granules) {
  uint end = divide_up(tile.end, granules);
  for (uint base = tile.first / granules; base < end; base += THREADS) {
    uint part = base + gl_LocalInvocationID.x;
    float logit[SUBS], variance[SUBS];
    [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) logit[sub] = variance[sub] = 0.0;
    for (uint first = 0; first < QUADS; first += SLICE) {
      uint quads = min(SLICE, QUADS - first);
      stage_sub_queries(slab.queries, 0, SUBS, first, first + quads);
      if (part >= end) continue;
      uint place = key_tiles ? key_tile_place(part, first) : super_place(part, first);
      add_products(logit, variance, place, key_tiles ? 2 : 1, key_tiles, quads);
    }
    if (part >= end) continue;
    [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) {
      if (key_tiles) {
        put_key_tile(part, sub, logit[sub], variance[sub]);
      } else {
        put_super_tile(part, sub, logit[sub]);
      }
    }
  }
}

void score_super_tiles(Tile tile) { score_parts(tile, false, SUPER_TILE_GRANULES); }
void score_key_tiles(Tile tile) { score_parts(tile, true, KEY_TILE_GRANULES); }

void score_granules(Tile tile) {
  LogSum total[SUBS];
  [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) total[sub] = LogSum(-INFINITY, 0.0);
  for (uint base = tile.first_place; base < tile.end_place; base += THREADS) {
    uint place = base + gl_LocalInvocationID.x;
    bool exists = place < tile.end_place;
    uint granule = exists ? granule_at(place) : 0;
    float logit[SUBS], variance[SUBS];
    [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) logit[sub] = variance[sub] = 0.0;
    for (uint first = 0; first < QUADS; first += SLICE) {
      uint quads = min(SLICE, QUADS - first);
      if (SLICE < QUADS || base == tile.first_place) {
        stage_sub_queries(slab.queries, 0, SUBS, first, first + quads);
      }
      if (!exists) continue;
      add_products(logit, variance, granule_place(granule, first), 2 * SUPER_TILE_GRANULES, true,
                   quads);
    }
    if (!exists) continue;
    bool seen = is_seen(note_of(place));
    float count = max(log_count(granule * GRANULE_ROWS, GRANULE_ROWS), 0.0);
    [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) {
      add_term(total[sub], put_granule(place, sub, granule / SUPER_TILE_GRANULES, seen, count,
                                       logit[sub], variance[sub]));
    }
  }
  join_log_sums(total);
}

void score_candidates(Tile tile, uint n) {
  for (uint base = 0; base < n * TAKERS; base += THREADS) {
    uint candidate = (base + gl_LocalInvocationID.x) / TAKERS;
    uint taker = (base + gl_LocalInvocationID.x) % TAKERS;
    uint granule = granule_at(slab.candidates.value[min(candidate, n - 1)]);
    // Without a soft cap both add up to one logit.
    float logit[TAKEN * PARTS], variance[TAKEN * PARTS];
    [[unroll]] for (uint i = 0; i < TAKEN * PARTS; ++i) logit[i] = variance[i] = 0.0;
    for (uint first = 0; first < QUADS; first += FINE_SLICE) {
      uint quads = min(FINE_SLICE, QUADS - first);
      if (FINE_SLICE < QUADS || base == 0) {
        stage_sub_queries(slab.queries, SUBS * QUADS * 2, FINE_SUBS, first, first + quads);
      }
      if (candidate >= n) continue;
      for (uint quad = 0; quad < quads; ++quad) {
        vec4 part[2 * PARTS];
        uint place = part_place(granule, first + quad);
        [[unroll]] for (uint i = 0; i < 2 * PARTS; ++i) part[i] = summaries.vector[place + i];
        [[unroll]] for (uint i = 0; i < TAKEN; ++i) {
          uint at = (quad * FINE_SUBS + i * TAKERS + taker) * 2;
          vec4 mean = staged[at], square = staged[at + 1];
          [[unroll]] for (uint j = 0; j < PARTS; ++j) {
            logit[i * PARTS + j] += dot(part[j], mean);
            variance[i * PARTS + j] += dot(part[PARTS + j], square);
          }
        }
      }
    }
    if (candidate >= n) continue;
    float counts[PARTS];
    [[unroll]] for (uint j = 0; j < PARTS; ++j) {
      counts[j] = log_count(granule * GRANULE_ROWS + j * PART_ROWS, PART_ROWS);
    }
    [[unroll]] for (uint i = 0; i < TAKEN; ++i) {
      float mass[PARTS], largest = -INFINITY, sum = 0.0;
      [[unroll]] for (uint j = 0; j < PARTS; ++j) {
        vec2 bent = capped(logit[i * PARTS + j]);
        mass[j] = fma(variance[i * PARTS + j], bent.y / 2.0, bent.x) + counts[j];
        largest = max(largest, mass[j]);
      }
      [[unroll]] for (uint j = 0; j < PARTS; ++j) {
        sum += exp_of(mass[j] - shift_of(largest));
      }
      store_fine(slab, candidate, i * TAKERS + taker, shift_of(largest) + log_or_none(sum));
    }
  }
}

void main() { route(); }
