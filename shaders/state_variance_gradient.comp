#version 460
// Gradient of the variances of a state from the level biases and the tilts of the queries in a
// super-tile's worth of positions: a workgroup takes four quads of columns.
#include "common/state_rows.glsl"

const uint PART_QUADS = 4;
const uint LANES = THREADS / PART_QUADS;  // of rows

shared vec4 lane_sums[2][THREADS];
shared float lane_ratios[THREADS];

// Sums over the lanes.
void reduce_lanes() {
  uint self = gl_LocalInvocationID.x;
  for (uint rest = THREADS / 2; rest >= PART_QUADS; rest /= 2) {
    barrier();
    if (self < rest) {
      lane_sums[0][self] += lane_sums[0][self + rest];
      lane_sums[1][self] += lane_sums[1][self + rest];
      lane_ratios[self] += lane_ratios[self + rest];
    }
  }
}

void main() {
  uint blocks = divide_up(QUADS, PART_QUADS), self = gl_LocalInvocationID.x;
  uint quad = workgroup_index() % blocks * PART_QUADS + self % PART_QUADS;
  if (!locate_part(workgroup_index() / blocks)) return;
  uint seen = state_seen(part);
  if (seen == 0) return;  // nothing depends on it
  View queries = view_of(OPERAND_Q, first_head(), LOG2_BYTES);
  View biases = view_of(OPERAND_LEVEL_BIAS, first_head(), 2);
  View dbiases = view_of(OPERAND_DLEVEL_BIAS, first_head(), 2);
  View shares = view_of(OPERAND_SHARES, first_head(), 2);
  View dshares = view_of(OPERAND_DSHARES, first_head(), 2);
  vec4 within_granules = vec4(0), within_super_tiles = vec4(0);
  float ratio = 0;
  for (uint row = self / PART_QUADS; row < part_rows(); row += LANES) {
    vec4 query = quad < QUADS ? query_quad(queries, row, quad) : vec4(0);
    vec2 gradient = bias_sum_gradient(biases, dbiases, row);
    within_granules = fma(query * query, gradient.xxxx, within_granules);
    within_super_tiles = fma(query * query, gradient.yyyy, within_super_tiles);
    // At level 2 the cotangent of the share is that of the tilt as a whole.
    if (has(FEATURE_DOUT)) ratio = fma(load_pair(shares, row).x, load_pair(dshares, row).y, ratio);
  }
  lane_sums[0][self] = within_granules;
  lane_sums[1][self] = within_super_tiles;
  lane_ratios[self] = ratio;
  reduce_lanes();
  vec2 traces = traces_of(state_at(OPERAND_STATE, kv_head), seen);
  if (self >= PART_QUADS || quad >= QUADS) return;
  vec2 of_traces = vec2(0);
  if (traces.y > 0) of_traces = lane_ratios[self] / traces.y * vec2(1, -traces.x / traces.y);
  Vectors gradients = state_at(OPERAND_DSTATE, kv_head);
  gradients.vector[variance_place(part, 0, quad)] = lane_sums[0][self] + of_traces.x;
  gradients.vector[variance_place(part, 1, quad)] = lane_sums[1][self] + of_traces.y;
}
