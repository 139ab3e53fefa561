#version 460
// Cotangents of the shares of coarse rows, from those of the output: by level, dout . tilt.
#include "common/state_rows.glsl"
#include "common/state_product.glsl"
#include "common/store.glsl"

shared float products[TILE_ROWS * COLUMN_QUADS];

View queries;

vec4 input_quad(uint row, uint quad) { return query_quad(queries, row, quad); }

void main() {
  if (!locate_tile()) return;
  uint seen = state_seen(part);
  Vectors state = state_at(OPERAND_STATE, kv_head);
  queries = view_of(OPERAND_Q, first_head(), LOG2_BYTES);
  View cotangents = view_of(OPERAND_DOUT, first_head(), LOG2_BYTES);
  vec2 tilts = tilts_of(state, seen);
  float own[THREAD_TILE];
  [[unroll]] for (uint i = 0; i < THREAD_TILE; ++i) own[i] = 0;
  for (uint column = 0; column < QUADS; column += COLUMN_QUADS) {
    vec4 sums[THREAD_TILE];
    multiply_state(state, seen, column, true, sums);
    uint quad = column + thread_column();
    [[unroll]] for (uint i = 0; i < THREAD_TILE; ++i) {
      uint row = thread_row(i);
      if (quad < QUADS && row_exists(row)) own[i] += dot(sums[i], load_quad(cotangents, row, quad));
    }
  }
  [[unroll]] for (uint i = 0; i < THREAD_TILE; ++i) {
    products[thread_row(i) * COLUMN_QUADS + thread_column()] = own[i];
  }
  barrier();
  View results = view_of(OPERAND_DSHARES, first_head(), 2);
  for (uint row = gl_LocalInvocationID.x; row < TILE_ROWS; row += THREADS) {
    if (!row_exists(row)) break;
    float sum = 0;
    for (uint i = 0; i < COLUMN_QUADS; ++i) sum += products[row * COLUMN_QUADS + i];
    uint start = row_start(results, row_position(row), row_head(row));
    store_float(results.base, start, sum * tilts.x);
    store_float(results.base, start + 1, sum * tilts.y);
  }
}
