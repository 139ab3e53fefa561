// The router, all but the products of queries and keys, which the kernels make: prices of tiles.
#include "common/boundary.glsl"
#include "common/elementary.glsl"
#include "common/workgroup.glsl"
#include "common/router_slab.glsl"

#define PRICE_INFINITE 0x7f80u
#define PRICE_KEPT 0x6f00u  // 2^95: no error reaches it

const float LARGEST_VARIANCE = 2.0;
// Sums of sub-queries that the workgroup finds together.
const uint TOGETHER = SUBS < REDUCED_AT_ONCE ? SUBS : REDUCED_AT_ONCE;

shared float sub_log_sum[SUBS];        // of the mass of what a sub-query sees
shared float sub_outside[SUBS];        // of what it sees elsewhere than the tile looks into
shared float fine_log_sum[FINE_SUBS];  // the same by finer sub-queries, after stage 2

struct Tile {
  uint number;
  uint list;
  uint kv_head;
  uint first, end;  // granules that it may see
  uint first_place, end_place;  // of the granules that it looks into
};

Slab slab;
ConstantVectors summaries;

float log_or_none(float x) { return x > 0.0 ? log_accurate(x) : -INFINITY; }
float shift_of(float log_sum) { return log_sum == -INFINITY ? 0.0 : log_sum; }

// exp(x) - 1 for x from 0 to LARGEST_VARIANCE.
float relative_variance(float x) {
  x = min(x, LARGEST_VARIANCE);
  if (x > 0.5) return exp_accurate(x) - 1.0;
  float y = 1.0 / 362880.0;
  y = fma(y, x, 1.0 / 40320.0);
  y = fma(y, x, 1.0 / 5040.0);
  y = fma(y, x, 1.0 / 720.0);
  y = fma(y, x, 1.0 / 120.0);
  y = fma(y, x, 1.0 / 24.0);
  y = fma(y, x, 1.0 / 6.0);
  y = fma(y, x, 0.5);
  return fma(y * x, x, x);
}

// The logit after the soft cap, and the square of its slope, by which variances shrink.
vec2 capped(float logit) {
  if (!has(FEATURE_SOFT_CAP)) return vec2(logit, 1);
  float bent = tanh_accurate(logit / call.soft_cap);
  float slope = 1.0 - bent * bent;
  return vec2(call.soft_cap * bent, slope * slope);
}

float log_count(uint first, uint rows) { return log_or_none(float(rows_from(first, rows))); }

uint upper_half(float x) { return x > 0.0 ? floatBitsToUint(x) >> 16 : 0; }

// A sum of exponentials that grows term by term.
struct LogSum {
  float largest;
  float sum;  // of exp(x - largest)
};

void add_term(inout LogSum total, float x) {
  if (x > total.largest) {
    total.sum = fma(total.sum, exp_accurate(total.largest - x), 1.0);
    total.largest = x;
  } else if (x != -INFINITY) {
    total.sum += exp_accurate(x - total.largest);
  }
}

// With what lies outside, which is to have been set before the last barrier.
float log_sum_of(uint sub, float largest, float sum) {
  float inside = shift_of(largest) + log_or_none(sum);
  if (FOREMOST == 0 || sub_outside[sub] == -INFINITY) return inside;
  LogSum all = LogSum(sub_outside[sub], 1.0);
  add_term(all, inside);
  return all.largest + log_accurate(all.sum);
}

// The logarithms of the workgroup's sums, and of what lies outside, into sub_log_sum.
void join_log_sums(LogSum own[SUBS]) {
  for (uint first = 0; first < SUBS; first += TOGETHER) {
    float largest[TOGETHER];
    barrier();
    [[unroll]] for (uint i = 0; i < TOGETHER; ++i) {
      reduced[i * THREADS + gl_LocalInvocationID.x] = own[first + i].largest;
    }
    reduce_columns(TOGETHER, true);
    [[unroll]] for (uint i = 0; i < TOGETHER; ++i) largest[i] = reduced[i];
    barrier();
    [[unroll]] for (uint i = 0; i < TOGETHER; ++i) {
      float factor = exp_accurate(own[first + i].largest - shift_of(largest[i]));
      reduced[i * THREADS + gl_LocalInvocationID.x] = own[first + i].sum * factor;
    }
    reduce_columns(TOGETHER, false);
    if (gl_LocalInvocationID.x < TOGETHER) {
      uint i = gl_LocalInvocationID.x;
      sub_log_sum[first + i] = log_sum_of(first + i, largest[i], reduced[i]);
    }
  }
  barrier();
}

// Of the kernel: both stages' products.
//
// Stage 1: marks the granules that the tile may see, weighs them by their means and variances, and
// sums that into sub_log_sum. Returns how many the tile sees.
uint score_granules(Tile tile);
// Stage 2: the mass of n candidates by finer sub-queries and parts of granules, into slab.fine.
void score_candidates(Tile tile, uint n);

uint marks_of(Boundary boundary) {
  return (boundary.whole ? MARK_WHOLE : 0) | (boundary.super_whole ? MARK_SUPER_WHOLE : 0);
}

uint granule_at(uint place) {
  if (FOREMOST == 0) return place;
  return slab.looked_into.value[place / SUPER_TILE_GRANULES] * SUPER_TILE_GRANULES +
         place % SUPER_TILE_GRANULES;
}

// Of a place of the tile.
Boundary boundary_at(Tile tile, uint place) {
  uint granule = granule_at(place);
  // Super-tiles that are looked into reach further than what the tile sees.
  if (FOREMOST != 0 && (granule < tile.first || granule >= tile.end)) {
    return Boundary(false, false, false, false);
  }
  return boundary_of(tile.number, granule);
}

// Mean squared probabilities after stage 1.
void judge_granules(Tile tile) {
  for (uint place = tile.first_place + gl_LocalInvocationID.x; place < tile.end_place;
       place += THREADS) {
    float importance = 0.0;
    for (uint sub = 0; sub < SUBS; ++sub) {
      float mass = slab.log_mass.value[sub * place_count() + place];
      if (mass == -INFINITY) continue;
      float share = exp_accurate(mass - shift_of(sub_log_sum[sub]));
      importance = fma(share * share, sub_weight[sub], importance);
    }
    if (slab.log_mass.value[place] != -INFINITY) slab.importance.value[place] = importance;
  }
}

// Of what is seen from `first` to `end`: the bits of the n-th largest importance, or 0 where there are
// fewer, and how many are larger.
uvec2 nth_largest(SharedFloats importance, uint first, uint end, uint n) {
  uint prefix = 0, known = 0, above = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    barrier();
    for (uint i = gl_LocalInvocationID.x; i < 256; i += THREADS) histogram[i] = 0;
    barrier();
    for (uint i = first + gl_LocalInvocationID.x; i < end; i += THREADS) {
      uint bits = floatBitsToUint(importance.value[i]);
      if (bits < 0x80000000u && (bits & known) == prefix) {
        atomicAdd(histogram[(bits >> shift) & 255u], 1u);
      }
    }
    uvec2 bin = find_bin(n - above);
    prefix |= bin.x << shift;
    known |= 255u << shift;
    above += bin.y;
  }
  return uvec2(prefix, above);
}

// The n most important from `begin` to `end`, in ascending order; of equals the first.
void choose(SharedFloats importance, uint begin, uint end, uint n, SharedWords chosen) {
  uvec2 least = nth_largest(importance, begin, end, n);
  uint each = divide_up(end - begin, THREADS);
  uint first = min(begin + gl_LocalInvocationID.x * each, end);
  end = min(first + each, end);
  uvec2 own = uvec2(0);
  for (uint i = first; i < end; ++i) {
    uint bits = floatBitsToUint(importance.value[i]);
    if (bits < 0x80000000u) own += uvec2(bits > least.x, bits == least.x);
  }
  uvec2 before = uvec2(scan(own.x), scan(own.y)) - own;
  for (uint i = first; i < end; ++i) {
    uint bits = floatBitsToUint(importance.value[i]);
    if (bits >= 0x80000000u) continue;
    bool equal = bits == least.x;
    uint room = n - least.y;
    if (bits > least.x || (equal && before.y < room)) {
      chosen.value[before.x + min(before.y, room)] = i;
    }
    before += uvec2(bits > least.x, equal);
  }
}

// The place of candidate i of n.
uint candidate_place(Tile tile, uint i, uint n) {
  // Fewer where an importance is NaN.
  return min(slab.candidates.value[min(i, n - 1)], tile.end_place - 1);
}

void choose_candidates(Tile tile, uint n) {
  choose(slab.importance, tile.first_place, tile.end_place, n, slab.candidates);
  sync_slab();
  for (uint i = gl_LocalInvocationID.x; i < n; i += THREADS) {
    slab.marks.value[candidate_place(tile, i, n)] |= (i + 1) << MARK_BITS;
  }
}

#include "common/foremost.glsl"

// Sums the mass of candidates and of the rest, and leaves in `fine` the mean squared probability of
// each candidate and sub-query, at its first finer one, and in sub_log_sum what those of the rest are
// relative to: the shift that gives the mean over finer sub-queries of exp(2 (x - their sum)).
void refine(Tile tile, uint n) {
  LogSum rest[SUBS];
  [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) rest[sub] = LogSum(-INFINITY, 0.0);
  for (uint place = tile.first_place + gl_LocalInvocationID.x; place < tile.end_place;
       place += THREADS) {
    if (slab.marks.value[place] >> MARK_BITS != 0) continue;
    [[unroll]] for (uint sub = 0; sub < SUBS; ++sub) {
      add_term(rest[sub], slab.log_mass.value[sub * place_count() + place]);
    }
  }
  join_log_sums(rest);

  uint fine = gl_LocalInvocationID.x % FINE_SUBS;
  LogSum own = LogSum(-INFINITY, 0.0);
  for (uint i = gl_LocalInvocationID.x / FINE_SUBS; i < n; i += THREADS / FINE_SUBS) {
    add_term(own, slab.fine.value[i * FINE_SUBS + fine]);
  }
  reduced[gl_LocalInvocationID.x] = own.largest;
  reduced[THREADS + gl_LocalInvocationID.x] = own.sum;
  barrier();
  if (gl_LocalInvocationID.x < FINE_SUBS) {
    float largest = sub_log_sum[fine / FINES];
    for (uint i = fine; i < THREADS; i += FINE_SUBS) largest = max(largest, reduced[i]);
    float shift = shift_of(largest);
    float sum = exp_accurate(sub_log_sum[fine / FINES] - shift);
    for (uint i = fine; i < THREADS; i += FINE_SUBS) {
      sum = fma(reduced[THREADS + i], exp_accurate(reduced[i] - shift), sum);
    }
    fine_log_sum[fine] = shift_of(shift + log_or_none(sum));
  }
  barrier();
  for (uint sub = gl_LocalInvocationID.x; sub < SUBS; sub += THREADS) {
    float least = INFINITY, mean = 0.0;
    for (uint i = sub * FINES; i < (sub + 1) * FINES; ++i) least = min(least, fine_log_sum[i]);
    for (uint i = sub * FINES; i < (sub + 1) * FINES; ++i) {
      mean = fma(fine_part[i], exp_accurate(2.0 * (least - fine_log_sum[i])), mean);
    }
    sub_log_sum[sub] = least - log_accurate(max(mean, 1e-30)) / 2.0;
  }
  for (uint i = gl_LocalInvocationID.x; i < n * SUBS; i += THREADS) {
    uint sub = i % SUBS;
    float square = 0.0;
    for (uint j = sub * FINES; j < (sub + 1) * FINES; ++j) {
      float mass = slab.fine.value[i / SUBS * FINE_SUBS + j];
      square = fma(fine_part[j], exp_accurate(2.0 * (mass - fine_log_sum[j])), square);
    }
    slab.fine.value[i / SUBS * FINE_SUBS + sub * FINES] = square;
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

// The two prices of a granule that the tile sees, by sums over sub-queries of squared probabilities
// and of their errors at both levels.
uvec2 prices_of(float importance, vec2 errors, vec4 value, uint marks) {
  if (LEVELS == 1) {
    return uvec2(upper_half(importance * value.z / float(GRANULE_ROWS)), 0);
  }
  float error = errors.x * value.x;
  float exact = error / float(GRANULE_ROWS - 1);
  uint mean = PRICE_INFINITE;
  if (LEVELS > 2 && (marks & MARK_SUPER_WHOLE) != 0) {
    float super_error = errors.y * (value.x + value.y);
    exact = min(exact, super_error / float(GRANULE_ROWS));
    mean = upper_half(super_error - error);
  }
  return uvec2(upper_half(exact), mean);
}

// The squared probability of a granule that the tile sees, for a sub-query.
float squared_share(float mass, uint candidate, uint sub) {
  if (candidate != 0) return slab.fine.value[(candidate - 1) * FINE_SUBS + sub * FINES];
  return exp_accurate(2.0 * (mass - shift_of(sub_log_sum[sub])));
}

// Writes what errors say, and leaves the importance of granules as stage 2 sees it in the slab.
void write_prices(Tile tile, uvec2 prices) {
  float unit = value_unit();
  for (uint place = tile.first_place + gl_LocalInvocationID.x; place < tile.end_place;
       place += THREADS) {
    uint granule = granule_at(place);
    uvec2 price = uvec2(0);
    if (slab.log_mass.value[place] != -INFINITY) {
      uint marks = slab.marks.value[place];
      float importance = 0.0;
      vec2 errors = vec2(0);
      for (uint sub = 0; sub < SUBS; ++sub) {
        uint at = sub * place_count() + place;
        float share = squared_share(slab.log_mass.value[at], marks >> MARK_BITS, sub);
        share *= sub_weight[sub];
        importance += share;
        if (LEVELS > 1) errors = fma(vec2(share), load_variances(slab, at), errors);
      }
      slab.importance.value[place] = importance;
      price = prices_of(importance, errors, summaries.vector[value_place(granule)] / unit, marks);
      if ((marks & MARK_WHOLE) == 0) price.x = PRICE_INFINITE;
    }
    if (granule < granule_count()) Words(prices).word[granule] = price.x << 16 | price.y;
  }
}

// The n most important granules stay exact at any price that errors explain, and beyond, where a
// budget leaves no room, in the order of theirs.
void keep_foremost(Tile tile, uvec2 prices, uint n) {
  uint least = nth_largest(slab.importance, tile.first_place, tile.end_place, n).x;
  if (FOREMOST != 0 && least == 0) price_others(tile, prices, true);
  for (uint place = tile.first_place + gl_LocalInvocationID.x; place < tile.end_place;
       place += THREADS) {
    uint bits = floatBitsToUint(slab.importance.value[place]);
    if (bits >= 0x80000000u || bits < least) continue;
    uint granule = granule_at(place);
    uint price = Words(prices).word[granule];
    if (price >> 16 == PRICE_INFINITE) continue;
    Words(prices).word[granule] = (PRICE_KEPT + (price >> 19)) << 16 | (price & 0xffffu);
  }
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
  uint first = tile.number * TILE_POSITIONS;
  uint last = min(first + TILE_POSITIONS, query_limit) - 1;
  uint first_key = 0, end_key = first < query_limit ? key_limit : 0;
  if (has(FEATURE_CAUSAL)) end_key = min(end_key, last + 1);
  if (has(FEATURE_WINDOW)) {
    if (call.window_left >= 0) first_key = first - min(first, uint(call.window_left));
    if (call.window_right >= 0) end_key = min(end_key, last + uint(call.window_right) + 1);
  }
  tile.end = divide_up(end_key, GRANULE_ROWS);
  tile.first = min(first_key / GRANULE_ROWS, tile.end);
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
  uint seen_anywhere = 0;
  if (FOREMOST != 0 || LEVELS > 2) {
    score_super_tiles(tile);
    sync_slab();
  }
  if (FOREMOST != 0) seen_anywhere = look_into_foremost(tile);
  uint seen = score_granules(tile);
  if (FOREMOST == 0) seen_anywhere = seen;
  if (SHARED_MASS != 0) sync_slab();
  if (seen != 0) {
    judge_granules(tile);
    if (STAGES > 1) {
      sync_slab();
      uint n = uint(ceil(PARAMS.candidate_share * float(seen)));
      choose_candidates(tile, n);
      sync_slab();
      score_candidates(tile, n);
      sync_slab();
      refine(tile, n);
      sync_slab();
    }
  }
  price_others(tile, prices, false);
  write_prices(tile, prices);
  if (seen != 0) {
    keep_foremost(tile, prices, uint(ceil(PARAMS.floor_share * float(seen_anywhere))));
  }
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
