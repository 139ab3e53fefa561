#version 460
// The router (cross_tile_router.comp) with its products on cooperative matrices, of halves: 16
// sub-queries by 16 rows of keys a subgroup, means and variances apart. Queries stay in registers,
// rows of keys pass through shared memory.
#define HALF_PRODUCTS 1
#define KEYS_IN_HALVES true
// What is known to be nobody else's need not go past the first cache.
#define SHARED_IN_WORKGROUP
#include "common/coopmat_layout.glsl"
#include "common/router.glsl"

#define HalfLeft coopmat<float16_t, gl_ScopeSubgroup, 16, 16, gl_MatrixUseA>
#define HalfRight coopmat<float16_t, gl_ScopeSubgroup, 16, 16, gl_MatrixUseB>

const uint SUBGROUPS = THREADS / 32;
const uint DIM_TILES = HEAD_DIM / 16;
const uint PITCH = QUADS + 1;  // vectors from one staged row to the next: odd, to meet all banks
const uint FETCHES = 16 * QUADS / 32;
const uint FINE_TILES = FINE_SUBS / 16;
const uint SUB_ROWS = (SUBS + 7) / 8;  // that a lane holds elements of
const float LOG_GRANULE_ROWS = log(float(GRANULE_ROWS)), LOG_PART_ROWS = log(float(PART_ROWS));

layout(buffer_reference, std430, buffer_reference_align = 16) readonly buffer ConstantQuads {
  uvec4 quad[];
};

shared uvec4 staged[SUBGROUPS * 16 * PITCH];

// Of 16 sub-queries at a time: with all of them, or with rows fetched a step ahead, too few workgroups
// share a multiprocessor (an H100: 166 registers a thread, not 215, and 0.70 ms, not 0.75).
HalfLeft factors[2][DIM_TILES];

uint staged_start() { return gl_SubgroupID * 16 * PITCH; }
uint fetched_row(uint n) { return (n * 32 + gl_SubgroupInvocationID) / QUADS; }
uint fetched_column(uint n) { return (n * 32 + gl_SubgroupInvocationID) % QUADS; }
uint staged_place(uint n) { return staged_start() + fetched_row(n) * PITCH + fetched_column(n); }

// Sub-queries are rows too, 16 that stage 1 takes (those past SUBS are not used) and the finer ones.
void put_sub_query(bool fine, uint sub, uint quad, vec4 mean, vec4 square) {
  uint place = (fine ? 16 + sub : sub) * QUADS;
  SharedPairs halves = SharedPairs(uvec2(slab.queries));
  halves.pair[place * 2 + quad] = to_halves(mean);
  halves.pair[place * 2 + QUADS + quad] = to_halves(square * VARIANCE_SCALE);
}

// Takes 16 sub-queries from row `first` on.
void load_factors(uint first) {
  SharedQuads rows = SharedQuads(uvec2(slab.queries));
  sync_subgroup();
  [[unroll]] for (uint n = 0; n < FETCHES; ++n) {
    staged[staged_place(n)] = rows.quad[(first + fetched_row(n)) * QUADS + fetched_column(n)];
  }
  sync_subgroup();
  [[unroll]] for (uint kind = 0; kind < 2; ++kind) {
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      coopMatLoad(factors[kind][d], staged, staged_start() + kind * (QUADS / 2) + 2 * d, PITCH,
                  ROW_MAJOR);
    }
  }
}

// Fetches 16 rows of keys, row r of which lies at place[r / 4] and r % 4 rows further.
void fetch_rows(uvec4 place, out uvec4 fetched[FETCHES]) {
  ConstantQuads rows = ConstantQuads(uvec2(summaries));
  [[unroll]] for (uint n = 0; n < FETCHES; ++n) {
    uint row = fetched_row(n);
    uint first = row < 8 ? (row < 4 ? place.x : place.y) : (row < 12 ? place.z : place.w);
    fetched[n] = rows.quad[first + row % 4 * QUADS + fetched_column(n)];
  }
}

// Rows of granules, from each of four on.
void fetch_granules(uvec4 granule, out uvec4 fetched[FETCHES]) {
  fetch_rows(granule_row_place(0) + granule * QUADS, fetched);
}

// 16 rows one after another.
void fetch_neighbours(uint place, out uvec4 fetched[FETCHES]) {
  fetch_rows(place + uvec4(0, 4, 8, 12) * QUADS, fetched);
}

void stage_rows(uvec4 fetched[FETCHES]) {
  sync_subgroup();
  [[unroll]] for (uint n = 0; n < FETCHES; ++n) staged[staged_place(n)] = fetched[n];
  sync_subgroup();
}

// Of these and the staged rows: of the means, or of the variances.
void multiply(uint kind, out float products[LANE_ELEMENTS]) {
  Accumulator sum = Accumulator(0.0);
  [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
    HalfRight rows;
    coopMatLoad(rows, staged, staged_start() + kind * (QUADS / 2) + 2 * d, PITCH, COLUMN_MAJOR);
    sum = coopMatMulAdd(factors[kind][d], rows, sum);
  }
  to_known(sum);
  [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; ++i) products[i] = sum[i];
}

// Of super-tiles, or of key tiles, of so many granules.
void score_parts(Tile tile, bool key_tiles, uint granules) {
  uint end = divide_up(tile.end, granules);
  load_factors(0);
  for (uint base = tile.first / granules; base < end; base += 16 * SUBGROUPS) {
    uint first = min(base + gl_SubgroupID * 16, end - 1);
    uvec4 fetched[FETCHES];
    fetch_neighbours(key_tiles ? key_tile_row_place(first) : super_row_place(first), fetched);
    stage_rows(fetched);
    float logit[LANE_ELEMENTS], variance[LANE_ELEMENTS];
    multiply(0, logit);
    if (key_tiles) multiply(1, variance);
    [[unroll]] for (uint i = 0; i < SUB_ROWS * LANE_COLUMNS; ++i) {
      uint part = first + element_column(i), sub = element_row(i);
      if (part >= end || sub >= SUBS) continue;
      if (key_tiles) {
        put_key_tile(part, sub, logit[i], variance[i]);
      } else {
        put_super_tile(part, sub, logit[i]);
      }
    }
  }
}

void score_super_tiles(Tile tile) { score_parts(tile, false, SUPER_TILE_GRANULES); }
void score_key_tiles(Tile tile) { score_parts(tile, true, KEY_TILE_GRANULES); }

// Of the rows that the lanes of all subgroups hold elements of.
void join_lane_sums(LogSum own[SUB_ROWS]) {
  [[unroll]] for (uint h = 0; h < SUB_ROWS; ++h) {
    float largest = quad_max(own[h].largest);
    float sum = quad_sum(own[h].sum * exp_of(own[h].largest - shift_of(largest)));
    if (gl_SubgroupInvocationID % 4 == 0) {
      uint place = (gl_SubgroupID * 16 + lane_row(h)) * 2;
      reduced[place] = largest;
      reduced[place + 1] = sum;
    }
  }
  barrier();
  for (uint sub = gl_LocalInvocationID.x; sub < SUBS; sub += THREADS) {
    float largest = -INFINITY, sum = 0.0;
    for (uint i = 0; i < SUBGROUPS; ++i) largest = max(largest, reduced[(i * 16 + sub) * 2]);
    for (uint i = 0; i < SUBGROUPS; ++i) {
      float factor = exp_of(reduced[(i * 16 + sub) * 2] - shift_of(largest));
      sum = fma(reduced[(i * 16 + sub) * 2 + 1], factor, sum);
    }
    sub_log_sum[sub] = log_sum_of(sub, largest, sum);
  }
  barrier();
}

// The first of each four granules of a subgroup's 16 places; past the end those of the last place.
uvec4 granules_from(Tile tile, uint base) {
  uint first = base + gl_SubgroupID * 16, last = tile.end_place - 1;
  uvec4 place = min(first + uvec4(0, 4, 8, 12), uvec4(last)) / 4 * 4;
  if (FOREMOST == 0) return place;
  uint near = granule_at(place.x), far = granule_at(place.z);
  return uvec4(near, near + place.y - place.x, far, far + place.w - place.z);
}

void score_granules(Tile tile) {
  load_factors(0);
  LogSum total[SUB_ROWS];
  [[unroll]] for (uint h = 0; h < SUB_ROWS; ++h) total[h] = LogSum(-INFINITY, 0.0);
  // All subgroups take as many steps: those past the end look at the last rows again, for nothing.
  uint base = tile.first_place / 16 * 16, step = 16 * SUBGROUPS;
  for (; base < tile.end_place; base += step) {
    uint first = base + gl_SubgroupID * 16;
    uvec4 granules = granules_from(tile, base), fetched[FETCHES];
    fetch_granules(granules, fetched);
    stage_rows(fetched);
    float logit[LANE_ELEMENTS], variance[LANE_ELEMENTS];
    multiply(0, logit);
    multiply(1, variance);
    bool all_whole = (max(granules.x, granules.z) + 8) * GRANULE_ROWS <= key_limit;
    [[unroll]] for (uint c = 0; c < LANE_COLUMNS; ++c) {
      uint place = first + lane_column(c);
      if (place < tile.first_place || place >= tile.end_place) continue;
      bool seen = is_seen(note_of(place));
      uint granule = (lane_column(c) < 8 ? granules.x : granules.z) + lane_column(c) % 8;
      float count = LOG_GRANULE_ROWS;
      if (!all_whole) count = max(log_count(granule * GRANULE_ROWS, GRANULE_ROWS), 0.0);
      [[unroll]] for (uint h = 0; h < SUB_ROWS; ++h) {
        uint sub = lane_row(h), i = h * LANE_COLUMNS + c;
        if (sub >= SUBS) continue;
        add_term(total[h], put_granule(place, sub, granule / SUPER_TILE_GRANULES, seen, count,
                                       logit[i], variance[i]));
      }
    }
  }
  join_lane_sums(total);
}

// The granule of a candidate: of a subgroup's four from `first` on, in one of the next eight steps.
// Past the n-th that of the last one.
uint name_candidates(uint first, uint n) {
  uint lane = gl_SubgroupInvocationID;
  uint candidate = first + lane / 4 * (4 * SUBGROUPS) + lane % 4;
  return granule_at(slab.candidates.value[min(candidate, n - 1)]);
}

uvec4 named_granules(uint named, uint step) {
  return uvec4(subgroupShuffle(named, step * 4), subgroupShuffle(named, step * 4 + 1),
               subgroupShuffle(named, step * 4 + 2), subgroupShuffle(named, step * 4 + 3));
}

void fetch_parts(uvec4 granule, out uvec4 fetched[FETCHES]) {
  fetch_rows(part_row_place(0, 0) + granule * (PARTS * QUADS), fetched);
}

// By 16 finer sub-queries. A step takes four candidates a subgroup; what these are, each lane asks for
// one of the next eight steps.
void score_candidates_by(Tile tile, uint n, uint first_fine) {
  load_factors(16 + first_fine);
  const uint step = 4 * SUBGROUPS, named_steps = 8;
  uint named = 0;
  for (uint base = 0, turn = 0; base < n; base += step, ++turn) {
    uint first = base + gl_SubgroupID * 4;
    if (turn % named_steps == 0) named = name_candidates(first, n);
    uvec4 granules = named_granules(named, turn % named_steps), fetched[FETCHES];
    fetch_parts(granules, fetched);
    stage_rows(fetched);
    uint last = max(max(granules.x, granules.y), max(granules.z, granules.w));
    bool all_whole = (last + 1) * GRANULE_ROWS <= key_limit;
    // A lane holds two parts of a candidate in a row, its neighbour the other two.
    uint part = lane_column(0) % PARTS;
    bool low = lane_column(0) < PARTS;
    float logit[LANE_ELEMENTS], variance[LANE_ELEMENTS];
    multiply(0, logit);
    multiply(1, variance);
    [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; i += 2) {
      bool upper = i % LANE_COLUMNS != 0;
      uint granule = low ? granules[upper ? 2 : 0] : granules[upper ? 3 : 1];
      float mass[2];
      [[unroll]] for (uint j = 0; j < 2; ++j) {
        vec2 bent = capped(logit[i + j]);
        float count = LOG_PART_ROWS;
        if (!all_whole) {
          count = log_count(granule * GRANULE_ROWS + (part + j) * PART_ROWS, PART_ROWS);
        }
        mass[j] = fma(variance[i + j], bent.y / 2.0, bent.x) + count;
      }
      float largest = max(mass[0], mass[1]);
      largest = max(largest, subgroupShuffleXor(largest, 1));
      float shift = shift_of(largest);
      float sum = exp_of(mass[0] - shift) + exp_of(mass[1] - shift);
      sum += subgroupShuffleXor(sum, 1);
      uint candidate = first + (upper ? 2 : 0) + (low ? 0 : 1);
      if (candidate < n && gl_SubgroupInvocationID % 2 == 0) {
        store_fine(slab, candidate, first_fine + element_row(i), shift + log_or_none(sum));
      }
    }
  }
}

void score_candidates(Tile tile, uint n) {
  for (uint t = 0; t < FINE_TILES; ++t) score_candidates_by(tile, n, t * 16);
}

void main() { route(); }
