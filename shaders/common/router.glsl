// The router, all but the products of queries and keys, which the kernels make: prices of tiles.
#include "common/boundary.glsl"
#include "common/elementary.glsl"
#include "common/workgroup.glsl"
#include "common/prices.glsl"
#include "common/router_slab.glsl"
#include "common/log_sums.glsl"

const float LARGEST_VARIANCE = 2.0;
const float NEAR = 0.5;  // router.py
shared float fine_log_sum[FINE_SUBS];  // as sub_log_sum, by finer sub-queries, after stage 2

struct Tile {
  uint number;
  uint list;
  uint kv_head;
  TileBoundary bounds;
  uint first, end;  // granules that it may see
  uint first_place, end_place;  // of the granules that it looks into
};

Slab slab;
ConstantVectors summaries;

#include "common/ranking.glsl"

// exp(x) - 1 for x from 0 to LARGEST_VARIANCE.
float relative_variance(float x) {
  x = min(x, LARGEST_VARIANCE);
#if HALF_PRODUCTS
  return x > 0.0625 ? exp_of(x) - 1.0 : fma(x * fma(x, 1.0 / 6.0, 0.5), x, x);
#else
  if (x > 0.5) return exp_of(x) - 1.0;
  float y = 1.0 / 362880.0;
  y = fma(y, x, 1.0 / 40320.0);
  y = fma(y, x, 1.0 / 5040.0);
  y = fma(y, x, 1.0 / 720.0);
  y = fma(y, x, 1.0 / 120.0);
  y = fma(y, x, 1.0 / 24.0);
  y = fma(y, x, 1.0 / 6.0);
  y = fma(y, x, 0.5);
  return fma(y * x, x, x);
#endif
}

// The logit after the soft cap, and the square of its slope, by which variances shrink.
vec2 capped(float logit) {
  if (!has(FEATURE_SOFT_CAP)) return vec2(logit, 1);
  float bent = tanh_accurate(logit / call.soft_cap);
  float slope = 1.0 - bent * bent;
  return vec2(call.soft_cap * bent, slope * slope);
}

float log_count(uint first, uint rows) { return log_or_none(float(rows_from(first, rows))); }

// The upper half; of any that is not finite that of the largest that is: nothing but the boundary makes
// a tile read more than a budget allows.
uint finite_price(float x) {
  return x > 0.0 ? min(floatBitsToUint(x) >> 16, PRICE_INFINITE - 1) : 0;
}

// Of the kernel: both stages' products.
//
// Stage 1: weighs the granules at the tile's places by their means and variances, which it stores in
// the slab, and sums that into sub_log_sum.
void score_granules(Tile tile);
// Stage 2: the mass of n candidates by finer sub-queries and parts of granules, into slab.fine.
void score_candidates(Tile tile, uint n);

// The key tiles that the tile looks into, where notes lie in shared memory, too.
shared uint shared_looked_into[FOREMOST != 0 ? (SHARED_NOTES + 7) / 8 : 1];

uint looked_into(uint i) {
  if (SHARED_NOTES != 1) return shared_looked_into[i];
  return slab.looked_into.value[i];
}

uint granule_at(uint place) {
  if (FOREMOST == 0) return place;
  return looked_into(place / KEY_TILE_GRANULES) * KEY_TILE_GRANULES + place % KEY_TILE_GRANULES;
}

// Where the row of prices has those of a place; whether it has them at all.
uint price_place(uint place) { return has_all_prices() ? granule_at(place) : first_price() + place; }
bool has_price(uint place) { return !has_all_prices() || granule_at(place) < granule_count(); }

// Of a place of the tile.
Boundary boundary_at(Tile tile, uint place) {
  uint granule = granule_at(place);
  // Key tiles that are looked into reach further than what the tile sees.
  if (FOREMOST != 0 && (granule < tile.first || granule >= tile.end)) {
    return Boundary(false, false, false, false);
  }
  return boundary_of(tile.bounds, tile.number, granule);
}

// Notes what the tile may see of the granules at its places. Returns how many it sees.
uint mark_granules(Tile tile) {
  uint seen = 0;
  for (uint place = tile.first_place + gl_LocalInvocationID.x; place < tile.end_place;
       place += THREADS) {
    Boundary boundary = boundary_at(tile, place);
    set_note(place, (boundary.seen ? MARK_SEEN : 0) | (boundary.whole ? MARK_WHOLE : 0) |
                        (boundary.super_whole ? MARK_SUPER_WHOLE : 0));
    seen += boundary.seen ? 1 : 0;
  }
  return count_all(seen);
}

// What the products of a granule that the tile looks into say of its mass, for a sub-query.
float put_granule(uint place, uint sub, uint super_tile, bool seen, float log_count, float logit,
                  float variance) {
  vec2 bent = capped(logit);
  float spread = variance * bent.y;
  float mass = seen ? bent.x + spread / 2.0 + log_count : -INFINITY;
  store_mass(slab, place, sub, mass);
  if (LEVELS > 1) {
    vec2 variances = vec2(relative_variance(spread), 0);
    if (LEVELS > 2) {
      float apart = bent.x - slab.super_logits.value[super_tile * SUBS + sub];
      variances.y = relative_variance(fma(apart, apart, spread)) - variances.x;
    }
    store_variances(slab, place, sub, variances);
  }
  return mass;
}

// Mean squared probability by masses of stage 1.
float importance_of(vec4 mass[SUB_QUADS]) {
  float importance = 0.0;
  [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) {
    float share = exp_of(mass[sub / 4][sub % 4] - shift_of(sub_log_sum[sub]));
    importance = fma(share * share, sub_weight[sub], importance);
  }
  return importance;
}

// Places whose masses a thread reads before it uses the first: reads wait long for each other. With
// more at once the code outgrows the caches of instructions (docs/kernels.md, "The router").
const uint AT_ONCE = SUB_QUADS <= 2 ? 2 : 1;

// Those of a thread's next places; past the last one its masses again.
void load_masses_ahead(Tile tile, uint first, out vec4 mass[AT_ONCE][SUB_QUADS]) {
  [[unroll]] for (uint j = 0; j < AT_ONCE; ++j) {
    load_masses(slab, min(first + j * THREADS, tile.end_place - 1), mass[j]);
  }
}

// Mean squared probabilities after stage 1.
void judge_granules(Tile tile) {
  for (uint first = tile.first_place + gl_LocalInvocationID.x; first < tile.end_place;
       first += THREADS * AT_ONCE) {
    vec4 mass[AT_ONCE][SUB_QUADS];
    load_masses_ahead(tile, first, mass);
    [[unroll]] for (uint j = 0; j < AT_ONCE; ++j) {
      uint place = first + j * THREADS;
      if (place >= tile.end_place) break;
      uint note = note_of(place);
      if (is_seen(note)) set_note(place, with_importance(note, importance_of(mass[j])));
    }
  }
}

// From which granule on a causal tile, which sees so many, keeps them exact because they are near.
uint near_from(Tile tile, uint seen) {
  if (!has(FEATURE_CAUSAL)) return 0xffffffffu;
  uint own = tile.number * PARAMS.plan_positions / GRANULE_ROWS;
  return own - min(own, uint(ceil(NEAR * PARAMS.floor_share * float(seen))));
}

#include "common/foremost.glsl"

// The logarithms of the sums of mass by finer sub-queries, of n candidates and of the rest, of which
// sub_log_sum tells, into fine_log_sum.
void sum_candidates(uint n) {
  const uint step = THREADS / FINE_QUADS, ahead = 4;
  LogSum own[4];
  [[unroll]] for (uint c = 0; c < 4; ++c) own[c] = LogSum(-INFINITY, 0.0);
  for (uint i = gl_LocalInvocationID.x / FINE_QUADS; i < n; i += step * ahead) {
    vec4 mass[ahead];
    [[unroll]] for (uint j = 0; j < ahead; ++j) {
      mass[j] = vec4(-INFINITY);
      if (i + j * step < n) {
        uint place = (i + j * step) * FINE_QUADS + gl_LocalInvocationID.x % FINE_QUADS;
        mass[j] = slab.fine.vector[place];
      }
    }
    [[unroll]] for (uint j = 0; j < ahead; ++j) {
      [[unroll]] for (uint c = 0; c < 4; ++c) add_term(own[c], mass[j][c]);
    }
  }
  barrier();
  [[unroll]] for (uint c = 0; c < 4; ++c) {
    reduced[c * THREADS + gl_LocalInvocationID.x] = own[c].largest;
    reduced[(4 + c) * THREADS + gl_LocalInvocationID.x] = own[c].sum;
  }
  barrier();
  if (gl_LocalInvocationID.x < FINE_SUBS) {
    uint fine = gl_LocalInvocationID.x;
    uint first = fine % 4 * THREADS + fine / 4, end = first - fine / 4 + THREADS;
    float largest = sub_log_sum[fine / FINES];
    for (uint i = first; i < end; i += FINE_QUADS) largest = max(largest, reduced[i]);
    float shift = shift_of(largest);
    float sum = exp_of(sub_log_sum[fine / FINES] - shift);
    for (uint i = first; i < end; i += FINE_QUADS) {
      sum = fma(reduced[4 * THREADS + i], exp_of(reduced[i] - shift), sum);
    }
    fine_log_sum[fine] = shift_of(shift + log_or_none(sum));
  }
  barrier();
}

// After stage 2: leaves in sub_log_sum what masses are relative to, the shift that gives the mean over
// finer sub-queries of exp(2 (x - their sum)), and as the mass of each of the n candidates that which
// then gives the mean of its own.
void refine(Tile tile, uint n) {
  LogSum rest[SUBS];
  [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) rest[sub] = LogSum(-INFINITY, 0.0);
  for (uint first = tile.first_place + gl_LocalInvocationID.x; first < tile.end_place;
       first += THREADS * AT_ONCE) {
    vec4 mass[AT_ONCE][SUB_QUADS];
    load_masses_ahead(tile, first, mass);
    [[unroll]] for (uint j = 0; j < AT_ONCE; ++j) {
      uint place = first + j * THREADS;
      if (place >= tile.end_place) break;
      uint note = note_of(place);
      if (is_chosen(note) || !is_seen(note)) continue;
      [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) {
        add_term(rest[sub], mass[j][sub / 4][sub % 4]);
      }
    }
  }
  join_log_sums(rest);
  sum_candidates(n);
  for (uint sub = gl_LocalInvocationID.x; sub < SUBS; sub += THREADS) {
    float least = INFINITY, mean = 0.0;
    for (uint i = sub * FINES; i < (sub + 1) * FINES; ++i) least = min(least, fine_log_sum[i]);
    for (uint i = sub * FINES; i < (sub + 1) * FINES; ++i) {
      mean = fma(fine_part[i], exp_of(2.0 * (least - fine_log_sum[i])), mean);
    }
    sub_log_sum[sub] = least - log_of(max(mean, 1e-30)) / 2.0;
  }
  barrier();
  const uint ahead = 4;
  for (uint first = gl_LocalInvocationID.x; first < n * SUBS; first += THREADS * ahead) {
    vec4 mass[ahead];
    uint place[ahead];
    [[unroll]] for (uint j = 0; j < ahead; ++j) {
      uint i = min(first + j * THREADS, n * SUBS - 1);
      mass[j] = slab.fine.vector[i * FINES / 4];
      place[j] = slab.candidates.value[i / SUBS];
    }
    [[unroll]] for (uint j = 0; j < ahead; ++j) {
      uint i = first + j * THREADS;
      if (i >= n * SUBS) break;
      uint sub = i % SUBS;
      float square = 0.0;
      [[unroll]] for (uint f = 0; f < FINES; ++f) {
        uint fine = sub * FINES + f;
        float share = exp_of(2.0 * (mass[j][(i * FINES + f) % 4] - fine_log_sum[fine]));
        square = fma(fine_part[fine], share, square);
      }
      store_mass(slab, place[j], sub, sub_log_sum[sub] + log_or_none(square) / 2.0);
    }
  }
}

// Mean square of the values that the tile's key/value head has.
float value_unit() {
  float total = 0.0;
  for (uint i = gl_LocalInvocationID.x; i < super_tile_count(); i += THREADS) {
    total += summaries.vector[value_total_place(i)].x;
  }
  return max(reduce(total, false) / float(max(key_limit, 1)), 1.17549435e-38);
}

// The two prices of a granule that the tile sees, by sums over sub-queries of squared probabilities,
// of their errors at level 1, and of what level 2 adds to these.
uvec2 prices_of(float importance, vec2 errors, vec4 value, uint marks) {
  if (LEVELS == 1) {
    return uvec2(finite_price(importance * value.z / float(GRANULE_ROWS)), 0);
  }
  float error = errors.x * value.x;
  float exact = error / float(GRANULE_ROWS - 1);
  uint mean = PRICE_INFINITE;
  if (LEVELS > 2 && (marks & MARK_SUPER_WHOLE) != 0) {
    // By what level 2 adds, so that the rounding of variances is not that of a difference.
    float added = fma(errors.x + errors.y, value.y, errors.y * value.x);
    exact = min(exact, (error + added) / float(GRANULE_ROWS));
    mean = finite_price(added);
  }
  return uvec2(finite_price(exact), mean);
}

// Writes what errors say, and notes the importance of granules as stage 2 sees it.
void write_prices(Tile tile, uvec2 prices) {
  const uint ahead = SUB_QUADS <= 2 ? 2 : 1;
  float unit = value_unit();
  for (uint first = tile.first_place + gl_LocalInvocationID.x; first < tile.end_place;
       first += THREADS * ahead) {
    vec4 mass[ahead][SUB_QUADS], value[ahead];
    uvec4 variances[ahead][SUB_QUADS];
    uint granule[ahead];
    [[unroll]] for (uint j = 0; j < ahead; ++j) {
      uint place = min(first + j * THREADS, tile.end_place - 1);
      granule[j] = granule_at(place);
      load_masses(slab, place, mass[j]);
      if (LEVELS > 1) load_variances(slab, place, variances[j]);
      value[j] = summaries.vector[value_place(granule[j])];
    }
    [[unroll]] for (uint j = 0; j < ahead; ++j) {
      uint place = first + j * THREADS;
      if (place >= tile.end_place) break;
      uint note = note_of(place);
      uvec2 price = uvec2(0);
      if (is_seen(note)) {
        float importance = 0.0;
        vec2 errors = vec2(0);
        [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) {
          float share = exp_of(2.0 * (mass[j][sub / 4][sub % 4] - shift_of(sub_log_sum[sub])));
          share *= sub_weight[sub];
          importance += share;
          if (LEVELS > 1) {
            errors = fma(vec2(share), unpack_variances(variances[j][sub / 4][sub % 4]), errors);
          }
        }
        set_note(place, with_importance(note, importance));
        price = prices_of(importance, errors, value[j] / unit, note);
        if ((note & MARK_WHOLE) == 0) price.x = PRICE_INFINITE;
      }
      if (has_price(place)) Words(prices).word[price_place(place)] = price.x << 16 | price.y;
    }
  }
}

// The n most important granules and those from `near` on stay exact at any price that errors explain,
// and beyond, where a budget leaves no room, in the order of theirs. Returns whether those that are
// not looked into, of no importance, are among them.
bool keep_foremost(Tile tile, uvec2 prices, uint n, uint near) {
  uint least = nth_key(tile.first_place, tile.end_place, n).x;
  for (uint place = tile.first_place + gl_LocalInvocationID.x; place < tile.end_place;
       place += THREADS) {
    uint note = note_of(place);
    if (!is_seen(note) || (key_of(note) < least && granule_at(place) < near)) continue;
    uint at = price_place(place), price = Words(prices).word[at];
    if (price >> 16 == PRICE_INFINITE) continue;
    Words(prices).word[at] = (PRICE_KEPT + (price >> 19)) << 16 | (price & 0xffffu);
  }
  return least == 0;
}

// Of all tiles, those of the last positions first: under a causal mask they see the most.
Tile tile_of(uint rank) {
  uint lists = PARAMS.query_heads / TILE_HEADS;
  uint head = rank % (lists * PARAMS.batch_count);
  set_batch(head / lists);
  set_visibility(0);
  Tile tile;
  tile.number = PARAMS.plan_tiles - 1 - rank / (lists * PARAMS.batch_count);
  tile.list = head % lists;
  tile.kv_head = tile.list / (lists / PARAMS.kv_heads);
  tile.bounds = boundary_of_tile(tile.number);
  tile.first = tile.bounds.seen.x;
  tile.end = tile.bounds.seen.y;
  tile.first_place = tile.first;
  tile.end_place = tile.end;
  return tile;
}

void price_tile(Tile tile) {
  View queries = view_of(OPERAND_Q, tile.list * TILE_HEADS, LOG2_BYTES);
  View price_view = view_of(OPERAND_PRICES, tile.list, 2);
  uvec2 prices =
      add_wide(price_view.base, multiply_wide(row_start(price_view, tile.number, 0), 4));
  summaries = ConstantVectors(view_of(OPERAND_KEY_SUMMARIES, tile.kv_head, 2).base);
  make_sub_queries(tile.number, queries);
  weigh_sub_queries(tile.number);
  sync_slab();
  uint seen = 0, seen_anywhere = 0;
  if (LEVELS > 2) score_super_tiles(tile);
  if (FOREMOST != 0) score_key_tiles(tile);
  if (FOREMOST != 0 || LEVELS > 2) sync_slab();
  if (FOREMOST != 0) seen_anywhere = look_into_foremost(tile);
  seen = mark_granules(tile);
  if (SHARED_NOTES == 1) sync_slab();
  if (FOREMOST == 0) seen_anywhere = seen;
  if (seen != 0) {
    score_granules(tile);
    sync_slab();
    judge_granules(tile);
    if (STAGES > 1) {
      sync_slab();
      uint n = min(uint(ceil(PARAMS.candidate_share * float(seen_anywhere))), seen);
      choose(tile.first_place, tile.end_place, n, slab.candidates);
      sync_slab();
      score_candidates(tile, n);
      sync_slab();
      refine(tile, n);
      sync_slab();
    }
  }
  write_prices(tile, prices);
  bool keeps_others = false;
  if (seen != 0) {
    uint n = uint(ceil(PARAMS.floor_share * float(seen_anywhere)));
    keeps_others = keep_foremost(tile, prices, n, near_from(tile, seen_anywhere));
  }
  price_others(tile, prices, keeps_others);
}

// The workgroups take turns from both ends, so that each gets long and short tiles.
void route() {
  set_batch(0);  // slabs are of no batch entry
  slab = slab_of(workgroup_index());
  uint tiles = PARAMS.plan_tiles * (PARAMS.query_heads / TILE_HEADS) * PARAMS.batch_count;
  uint workgroups = gl_NumWorkGroups.x * gl_NumWorkGroups.y;
  for (uint turn = 0; turn * workgroups < tiles; ++turn) {
    uint self = workgroup_index();
    uint rank = turn * workgroups + (turn % 2 == 0 ? self : workgroups - 1 - self);
    if (rank < tiles) price_tile(tile_of(rank));
  }
}
