// Sub-queries: what the router knows of a tile's queries. One stands for up to 16 positions of one
// head, and is made of finer ones of up to 4 positions, which stage 2 takes by themselves; each is a
// mean and a mean square.
#include "common/summaries.glsl"

layout(constant_id = 13) const uint LEVELS = 3;  // in use: 1: exact, 2: and means, 3: of super-tiles
layout(constant_id = 14) const uint STAGES = 2;
// 1: a tile looks into its foremost key tiles only (common/foremost.glsl).
layout(constant_id = 15) const uint FOREMOST = 0;
layout(constant_id = 16) const uint SHARED_NOTES = 1;  // of shared memory; 1: they lie in the slab

const uint TILE_POSITIONS = TILE_ROWS / TILE_HEADS;
const uint SUB_POSITIONS = TILE_POSITIONS < 16 ? TILE_POSITIONS : 16;
const uint FINE_POSITIONS = SUB_POSITIONS < 4 ? SUB_POSITIONS : 4;
const uint FINES = SUB_POSITIONS / FINE_POSITIONS;  // of a sub-query
const uint SUBS = TILE_POSITIONS / SUB_POSITIONS * TILE_HEADS;
const uint FINE_SUBS = SUBS * FINES;
const uint SUB_QUADS = (SUBS + 3) / 4;  // what is noted by sub-queries is read by four
const uint FINE_QUADS = FINE_SUBS / 4;

shared float sub_weight[SUBS];    // share of the tile's queries
shared float fine_part[FINE_SUBS];  // share of its sub-query's

uint sub_position(uint tile, uint sub) {
  return tile * TILE_POSITIONS + sub / TILE_HEADS * SUB_POSITIONS;
}

// Positions of a finer sub-query that are queries.
uint fine_rows(uint tile, uint sub, uint fine) {
  uint first = sub_position(tile, sub) + fine * FINE_POSITIONS;
  return min(FINE_POSITIONS, max(query_limit, first) - first);
}

const float LEAST_SHARE = 1e-6;  // to divide by where there are no queries

// In units of a whole finer sub-query.
float sub_share(uint tile, uint sub) {
  uint first = sub_position(tile, sub);
  uint rows = min(SUB_POSITIONS, max(query_limit, first) - first);
  return float(rows) / float(FINE_POSITIONS);
}

void weigh_sub_queries(uint tile) {
  for (uint i = gl_LocalInvocationID.x; i < FINE_SUBS; i += THREADS) {
    fine_part[i] = float(fine_rows(tile, i / FINES, i % FINES)) / float(FINE_POSITIONS) /
                   max(sub_share(tile, i / FINES), LEAST_SHARE);
  }
  for (uint sub = gl_LocalInvocationID.x; sub < SUBS; sub += THREADS) {
    float sum = 0;
    for (uint i = 0; i < SUBS; ++i) sum += sub_share(tile, i);
    sub_weight[sub] = sub_share(tile, sub) / max(sum, LEAST_SHARE);
  }
}

// Of the kernel: keeps quad `quad` of a sub-query, or of a finer one, in the slab.
void put_sub_query(bool fine, uint sub, uint quad, vec4 mean, vec4 square);

void make_sub_queries(uint tile, View queries) {
  for (uint i = gl_LocalInvocationID.x; i < SUBS * QUADS; i += THREADS) {
    uint quad = i % QUADS, sub = i / QUADS;
    uint first = sub_position(tile, sub);
    float whole = max(sub_share(tile, sub), LEAST_SHARE);
    vec4 mean = vec4(0), square = vec4(0);
    for (uint fine = 0; fine < FINES; ++fine) {
      uint rows = fine_rows(tile, sub, fine);
      // All are on their way before the first is used.
      vec4 values[FINE_POSITIONS];
      [[unroll]] for (uint row = 0; row < FINE_POSITIONS; ++row) {
        uint start = row_start(queries, first + fine * FINE_POSITIONS + row, sub % TILE_HEADS);
        values[row] = vec4(0);
        if (row < rows) values[row] = load_columns(queries.base, start, quad * 4);
      }
      vec4 sum = vec4(0), square_sum = vec4(0);
      [[unroll]] for (uint row = 0; row < FINE_POSITIONS; ++row) {
        vec4 value = values[row] * call.scale;
        sum += value;
        square_sum = fma(value, value, square_sum);
      }
      sum /= float(max(rows, 1));
      square_sum /= float(max(rows, 1));
      float part = float(rows) / float(FINE_POSITIONS) / whole;
      mean = fma(sum, vec4(part), mean);
      square = fma(square_sum, vec4(part), square);
      if (STAGES > 1) put_sub_query(true, sub * FINES + fine, quad, sum, square_sum);
    }
    put_sub_query(false, sub, quad, mean, square);
  }
}
