#version 460
// Sums of (k - mean k) (v - mean v) over each super-tile, after coarse_rows.comp: a workgroup takes a
// square of them.
#include "common/state.glsl"
#include "common/outer_products.glsl"

View keys, values;
Vectors state;
uint super_tile;

vec4 left_quad(uint row, uint quad) {
  uint start = row_start(keys, super_tile * SUPER_TILE_ROWS + row, 0);
  return load_columns(keys.base, start, quad * 4) - state.vector[mean_place(super_tile, 0, quad)];
}

vec4 right_quad(uint row, uint quad) {
  uint start = row_start(values, super_tile * SUPER_TILE_ROWS + row, 0);
  return load_columns(values.base, start, quad * 4) - state.vector[mean_place(super_tile, 1, quad)];
}

void main() {
  load_call();
  uint square = workgroup_index() % (SQUARES * SQUARES), index = workgroup_index() / (SQUARES * SQUARES);
  super_tile = index % super_tile_count();
  uint head = index / super_tile_count() % PARAMS.kv_heads;
  uint entry = index / super_tile_count() / PARAMS.kv_heads;
  if (entry >= PARAMS.batch_count) return;
  set_batch(entry);
  set_visibility(0);
  keys = view_of(OPERAND_K, head, LOG2_BYTES);
  values = view_of(OPERAND_V, head, LOG2_BYTES);
  state = state_at(OPERAND_STATE, head);
  uint left = square / SQUARES * OUTER_QUADS, right = square % SQUARES * OUTER_QUADS;
  vec4 sums[4];
  sum_outer_products(rows_from(super_tile * SUPER_TILE_ROWS, SUPER_TILE_ROWS), left, right, sums);
  left += gl_LocalInvocationID.x / OUTER_QUADS;
  right += gl_LocalInvocationID.x % OUTER_QUADS;
  if (gl_LocalInvocationID.x >= 64 || left >= QUADS || right >= QUADS) return;
  [[unroll]] for (uint i = 0; i < 4; ++i) {
    state.vector[covariance_place(super_tile, left * 4 + i, right)] = sums[i];
  }
}
