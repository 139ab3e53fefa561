#version 460
// Merges the records that the parts of work lists have left of each row, in order: out, logsumexp and
// shares. A thread has four columns of a row.
#include "common/elementary.glsl"
#include "common/query_parts.glsl"
#include "common/store.glsl"

vec4 load_record(uint head, uint position, uint part, uint quad) {
  return uintBitsToFloat(record_of(head, position, part).quad[quad]);
}

void main() {
  uint index = workgroup_index() * THREADS + gl_LocalInvocationID.x;
  uint quad = index % OUT_QUADS, row = index / OUT_QUADS;
  uint position = row % PARAMS.queries;
  row /= PARAMS.queries;
  uint head = row % PARAMS.query_heads, entry = row / PARAMS.query_heads;
  if (entry >= PARAMS.batch_count) return;
  set_batch(entry);

  float top = -INFINITY;
  for (uint part = 0; part < LIST_PARTS; ++part) {
    top = max(top, load_record(head, position, part, OUT_QUADS).x);
  }
  float sum = 0.0;
  vec4 out_sums = vec4(0);
  vec2 share_sums = vec2(0);
  for (uint part = 0; part < LIST_PARTS; ++part) {
    vec4 statistics = load_record(head, position, part, OUT_QUADS);
    if (statistics.y == 0.0) continue;  // it sees nothing
    float weight = statistics.y * exp_accurate(statistics.x - top);
    // What has no weight is hidden, NaN or not.
    if (weight == 0.0) continue;
    sum += weight;
    out_sums = fma(vec4(weight), load_record(head, position, part, quad), out_sums);
    share_sums = fma(vec2(weight), statistics.zw, share_sums);
  }
  bool empty = sum == 0.0;
  float share = empty ? 0.0 : 1.0 / sum;
  View view = view_of(OPERAND_OUT, head, LOG2_BYTES);
  store_columns(view.base, row_start(view, position, 0), quad * 4, out_sums * share);
  if (quad != 0) return;
  view = view_of(OPERAND_LSE, head, 2);
  store_float(view.base, row_start(view, position, 0),
              empty ? EMPTY_LOGSUMEXP : top + log_accurate(sum));
  if (has(FEATURE_SHARES)) {
    view = view_of(OPERAND_SHARES, head, 2);
    uint start = row_start(view, position, 0);
    store_float(view.base, start, share_sums.x * share);
    store_float(view.base, start + 1, share_sums.y * share);
  }
}
