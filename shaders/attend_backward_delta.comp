#version 460
// delta = sum(dout * out) + sum(dshares * shares) - dlogsumexp of every row; eight threads a row.
#include "common/store.glsl"

const uint ROW_THREADS = 8;

shared float partial_sums[THREADS];

// Of one thread's columns.
float partial_sum(View out_view, View dout_view, uint position) {
  float sum = 0.0;
  uint out_start = row_start(out_view, position, 0), dout_start = row_start(dout_view, position, 0);
  for (uint column = gl_LocalInvocationID.x % ROW_THREADS * 4; column < HEAD_DIM;
       column += ROW_THREADS * 4) {
    sum += dot(load_columns(dout_view.base, dout_start, column),
               load_columns(out_view.base, out_start, column));
  }
  return sum;
}

void main() {
  uint row = workgroup_index() * (THREADS / ROW_THREADS) + gl_LocalInvocationID.x / ROW_THREADS;
  uint entry = row / PARAMS.query_heads / PARAMS.queries;
  uint position = row / PARAMS.query_heads % PARAMS.queries;
  uint head = row % PARAMS.query_heads;
  bool exists = entry < PARAMS.batch_count;
  set_batch(min(entry, PARAMS.batch_count - 1));
  float sum = 0.0;
  if (exists && has(FEATURE_DOUT)) {
    sum = partial_sum(view_of(OPERAND_OUT, head, LOG2_BYTES),
                      view_of(OPERAND_DOUT, head, LOG2_BYTES), position);
  }
  partial_sums[gl_LocalInvocationID.x] = sum;
  barrier();
  if (!exists || gl_LocalInvocationID.x % ROW_THREADS != 0) return;
  for (uint i = 1; i < ROW_THREADS; ++i) sum += partial_sums[gl_LocalInvocationID.x + i];
  if (has(FEATURE_DLSE)) {
    View view = view_of(OPERAND_DLSE, head, 2);
    sum -= load_float(view.base, row_start(view, position, 0));
  }
  if (has(FEATURE_DSHARES)) {
    View shares = view_of(OPERAND_SHARES, head, 2), dshares = view_of(OPERAND_DSHARES, head, 2);
    uint start = row_start(shares, position, 0), dstart = row_start(dshares, position, 0);
    [[unroll]] for (uint level = 0; level < 2; ++level) {
      sum += load_float(shares.base, start + level) * load_float(dshares.base, dstart + level);
    }
  }
  View view = view_of(OPERAND_DELTA, head, 2);
  store_float(view.base, row_start(view, position, 0), sum);
}
