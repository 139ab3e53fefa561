#version 460
// Adds to the output what coarse values lack to first order: the tilt, Cov(v, k) q, by the shares of
// coarse rows.
#include "common/state_rows.glsl"
#include "common/state_product.glsl"
#include "common/store.glsl"

shared float weights[TILE_ROWS];

View queries, results;

vec4 input_quad(uint row, uint quad) { return query_quad(queries, row, quad); }

void add_columns(vec4 sums[THREAD_TILE], uint quad) {
  [[unroll]] for (uint i = 0; i < THREAD_TILE; ++i) {
    uint row = thread_row(i);
    // Rows that see nothing have no weight; what they hold may be anything.
    if (weights[row] == 0) continue;
    vec4 value = fma(sums[i], vec4(weights[row]), load_quad(results, row, quad));
    uint start = row_start(results, row_position(row), row_head(row));
    store_columns(results.base, start, quad * 4, value);
  }
}

void main() {
  if (!locate_tile()) return;
  uint seen = state_seen(part);
  if (seen == 0) return;  // it is zero
  Vectors state = state_at(OPERAND_STATE, kv_head);
  queries = view_of(OPERAND_Q, first_head(), LOG2_BYTES);
  results = view_of(OPERAND_OUT, first_head(), LOG2_BYTES);
  View shares = view_of(OPERAND_SHARES, first_head(), 2);
  vec2 tilts = tilts_of(state, seen);
  for (uint row = gl_LocalInvocationID.x; row < TILE_ROWS; row += THREADS) {
    weights[row] = tilt_weight(shares, row, tilts);
  }
  for (uint column = 0; column < QUADS; column += COLUMN_QUADS) {
    vec4 sums[THREAD_TILE];
    multiply_state(state, seen, column, true, sums);
    uint quad = column + thread_column();
    if (quad < QUADS) add_columns(sums, quad);
  }
}
