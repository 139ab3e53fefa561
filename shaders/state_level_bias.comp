#version 460
// What the mass of coarse rows lacks to second order, by row and level; eight threads a row.
#include "common/state.glsl"
#include "common/store.glsl"

const uint ROW_THREADS = 8;

shared vec2 partial_sums[THREADS];

void main() {
  load_call();
  uint row = workgroup_index() * (THREADS / ROW_THREADS) + gl_LocalInvocationID.x / ROW_THREADS;
  uint entry = row / PARAMS.query_heads / call.queries;
  uint position = row / PARAMS.query_heads % call.queries, head = row % PARAMS.query_heads;
  bool exists = entry < PARAMS.batch_count;
  set_batch(min(entry, PARAMS.batch_count - 1));
  Vectors state = state_at(OPERAND_STATE, head / group_heads());
  uint seen = state_seen(position / SUPER_TILE_ROWS);
  View queries = view_of(OPERAND_Q, head, LOG2_BYTES);
  uint start = row_start(queries, position, 0);
  vec2 sums = vec2(0);
  if (exists) {
    for (uint quad = gl_LocalInvocationID.x % ROW_THREADS; quad < QUADS; quad += ROW_THREADS) {
      vec4 query = load_columns(queries.base, start, quad * 4) * call.scale;
      sums += square_sums(state, seen, quad, query);
    }
  }
  partial_sums[gl_LocalInvocationID.x] = sums;
  barrier();
  if (!exists || gl_LocalInvocationID.x % ROW_THREADS != 0) return;
  for (uint i = 1; i < ROW_THREADS; ++i) sums += partial_sums[gl_LocalInvocationID.x + i];
  View biases = view_of(OPERAND_LEVEL_BIAS, head, 2);
  start = row_start(biases, position, 0);
  vec2 bias = level_bias_of(sums);
  store_float(biases.base, start, bias.x);
  store_float(biases.base, start + 1, bias.y);
}
