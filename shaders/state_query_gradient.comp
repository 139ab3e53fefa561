#version 460
// Adds to dq what comes through the tilt and through the level biases.
#include "common/state_rows.glsl"
#include "common/state_product.glsl"
#include "common/store.glsl"

shared float weights[TILE_ROWS];

View queries, cotangents, biases, dbiases, results;

vec4 input_quad(uint row, uint quad) {
  return weights[row] == 0 ? vec4(0) : load_quad(cotangents, row, quad) * weights[row];
}

void add_columns(vec4 sums[THREAD_TILE], uint quad, Vectors state, uint seen) {
  vec4 within_granules = state.vector[variance_place(seen, 0, quad)];
  vec4 within_super_tiles = state.vector[variance_place(seen, 1, quad)];
  [[unroll]] for (uint i = 0; i < THREAD_TILE; ++i) {
    uint row = thread_row(i);
    if (!row_exists(row)) continue;
    vec2 gradient = 2 * bias_sum_gradient(biases, dbiases, row);
    vec4 of_squares = within_granules * gradient.x + within_super_tiles * gradient.y;
    vec4 own = fma(query_quad(queries, row, quad), of_squares, sums[i]);
    uint start = row_start(results, row_position(row), row_head(row));
    vec4 value = fma(own, vec4(call.scale), load_quad(results, row, quad));
    store_columns(results.base, start, quad * 4, value);
  }
}

void main() {
  if (!locate_tile()) return;
  uint seen = state_seen(part);
  if (seen == 0) return;  // it is zero
  Vectors state = state_at(OPERAND_STATE, kv_head);
  queries = view_of(OPERAND_Q, first_head(), LOG2_BYTES);
  cotangents = view_of(OPERAND_DOUT, first_head(), LOG2_BYTES);
  biases = view_of(OPERAND_LEVEL_BIAS, first_head(), 2);
  dbiases = view_of(OPERAND_DLEVEL_BIAS, first_head(), 2);
  results = view_of(OPERAND_DQ, first_head(), LOG2_BYTES);
  View shares = view_of(OPERAND_SHARES, first_head(), 2);
  vec2 tilts = tilts_of(state, seen);
  for (uint row = gl_LocalInvocationID.x; row < TILE_ROWS; row += THREADS) {
    weights[row] = tilt_weight(shares, row, tilts);
  }
  for (uint column = 0; column < QUADS; column += COLUMN_QUADS) {
    vec4 sums[THREAD_TILE];
    if (has(FEATURE_DOUT)) {
      multiply_state(state, seen, column, false, sums);
    } else {
      [[unroll]] for (uint i = 0; i < THREAD_TILE; ++i) sums[i] = vec4(0);
    }
    uint quad = column + thread_column();
    if (quad < QUADS) add_columns(sums, quad, state, seen);
  }
}
