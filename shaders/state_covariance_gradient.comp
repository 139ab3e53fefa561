#version 460
// Gradient of Cov(v, k) from the tilts of the queries in a super-tile's worth of positions: a workgroup
// takes a square of it.
#include "common/state_rows.glsl"
#include "common/outer_products.glsl"

View queries, cotangents, shares;
vec2 tilts;

vec4 left_quad(uint row, uint quad) { return query_quad(queries, row, quad); }

vec4 right_quad(uint row, uint quad) {
  float weight = tilt_weight(shares, row, tilts);
  return weight == 0 ? vec4(0) : load_quad(cotangents, row, quad) * weight;
}

void main() {
  uint square = workgroup_index() % (SQUARES * SQUARES);
  if (!locate_part(workgroup_index() / (SQUARES * SQUARES))) return;
  uint seen = state_seen(part);
  if (seen == 0) return;  // nothing depends on it
  queries = view_of(OPERAND_Q, first_head(), LOG2_BYTES);
  cotangents = view_of(OPERAND_DOUT, first_head(), LOG2_BYTES);
  shares = view_of(OPERAND_SHARES, first_head(), 2);
  tilts = tilts_of(state_at(OPERAND_STATE, kv_head), seen);
  uint left = square / SQUARES * OUTER_QUADS, right = square % SQUARES * OUTER_QUADS;
  vec4 sums[4];
  sum_outer_products(part_rows(), left, right, sums);
  left += gl_LocalInvocationID.x / OUTER_QUADS;
  right += gl_LocalInvocationID.x % OUTER_QUADS;
  if (gl_LocalInvocationID.x >= 64 || left >= QUADS || right >= QUADS) return;
  Vectors gradient = state_at(OPERAND_DSTATE, kv_head);
  [[unroll]] for (uint i = 0; i < 4; ++i) {
    gradient.vector[covariance_place(part, left * 4 + i, right)] = sums[i];
  }
}
