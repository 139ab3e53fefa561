#version 460
// Forward-mode derivative of exact attention, for a tile of queries:
//   P = exp(s - logsumexp), dS = slope (dq . k + q . dk) + dbias, m = sum P dS,
//   dlogsumexp = m, dout = sum P (dS v + dv) - m out.
#define SCORE_PLANES 2
#define TILE_PLANES 2
#include "common/query_kernel.glsl"

shared float row_tangent[TILE_ROWS];  // m

View bias_tangent_view;

// From the products of a row (plane 0) and their tangents (plane 1) to P and P dS.
float update_row(uint row, uint position, bool mixed, float logsumexp) {
  float tangent = 0.0;
  uint head = row % TILE_HEADS;
  for (uint quad = 0; quad < SCORE_QUADS; ++quad) {
    uint index = row * SCORE_STRIDE + quad;
    vec4 weight = scores[index], weighted = scores[SCORE_PLANE + index];
    uint key = block_key(quad * 4);
    [[unroll]] for (uint i = 0; i < 4; ++i) {
      Score score = score_of(weight[i], position, head, key + i, mixed);
      weight[i] = probability(score.value, logsumexp);
      float change = score.slope * weighted[i];
      if (has(FEATURE_DBIAS) && weight[i] != 0.0) {
        change += load_element(bias_tangent_view.base,
                               row_start(bias_tangent_view, position, head) +
                                   (key + i) * bias_tangent_view.column_stride,
                               BIAS_DTYPE);
      }
      weighted[i] = weight[i] == 0.0 ? 0.0 : weight[i] * change;
    }
    tangent += (weighted.x + weighted.y) + (weighted.z + weighted.w);
    scores[index] = weight;
    scores[SCORE_PLANE + index] = weighted;
  }
  return tangent;
}

// sums -= m out.
void subtract_mean(inout vec4 sums[ACCUMULATORS], View out_view, uint first_position) {
  [[unroll]] for (uint i = 0; i < THREAD_ROWS; ++i) {
    uint start = tile_row_start(out_view, first_position, thread_row(i));
    if (start == ABSENT_ROW) continue;
    float mean = row_tangent[thread_row(i)];
    [[unroll]] for (uint slice = 0; slice < SLICES; ++slice) {
      [[unroll]] for (uint q = 0; q < THREAD_QUADS; ++q) {
        vec4 value = load_slice_quad(out_view, start, sum_column(slice, q));
        sums[sum_index(slice, q, i)] = fma(vec4(-mean), value, sums[sum_index(slice, q, i)]);
      }
    }
  }
}

void main() {
  QueryTile tile;
  if (!locate_query_tile(tile)) return;
  start_staging();
  set_scores(tile.first_head);
  View q = view_of(OPERAND_Q, tile.first_head, LOG2_BYTES);
  View k = view_of(OPERAND_K, tile.kv_head, LOG2_BYTES);
  View v = view_of(OPERAND_V, tile.kv_head, LOG2_BYTES);
  View dq = view_of(OPERAND_DQ, tile.first_head, LOG2_BYTES);
  View dk = view_of(OPERAND_DK, tile.kv_head, LOG2_BYTES);
  View dv = view_of(OPERAND_DV, tile.kv_head, LOG2_BYTES);
  View logsumexp_view = view_of(OPERAND_LSE, tile.first_head, 2);
  if (has(FEATURE_DBIAS)) {
    bias_tangent_view = view_of(OPERAND_DBIAS, tile.first_head, BIAS_LOG2_BYTES);
  }
  uint row = gl_LocalInvocationID.x;
  uint position = tile.first_position + row / TILE_HEADS;
  bool owns_row = row < TILE_ROWS && position < call.queries;
  float logsumexp = 0.0, tangent = 0.0;
  if (owns_row) {
    logsumexp =
        load_float(logsumexp_view.base, row_start(logsumexp_view, position, row % TILE_HEADS));
  }
  vec4 sums[ACCUMULATORS];
  [[unroll]] for (uint i = 0; i < ACCUMULATORS; ++i) sums[i] = vec4(0);

  for (uint i = 0; i < tile.list.y + tile.list.z; ++i) {
    load_block(OPERAND_LISTS, tile.list.x + i * BLOCK_GRANULES);
    bool mixed = i >= tile.list.y;
    bool guard = mixed || has(FEATURE_BIAS);
    float products[THREAD_SCORES], changes[THREAD_SCORES];
    clear(products);
    clear(changes);
    multiply_query_key(products, q, k, tile.first_position, 0, i > 0);
    if (has(FEATURE_DK)) {
      multiply_query_key(changes, q, dk, tile.first_position, 0, true);
    }
    if (has(FEATURE_DQ)) {
      multiply_query_key(changes, dq, k, tile.first_position, 1, i > 0);
    }
    put_products(products, 0);
    put_products(changes, 1);
    barrier();
    if (owns_row) tangent += update_row(row, position, mixed, logsumexp);
    if (has(FEATURE_DV)) multiply_key_block(sums, dv, 0, guard, false);
    if (has(FEATURE_DQ | FEATURE_DK | FEATURE_DBIAS)) multiply_key_block(sums, v, 1, guard, false);
  }

  if (owns_row) {
    row_tangent[row] = tangent;
    View view = view_of(OPERAND_DLSE, tile.first_head, 2);
    store_float(view.base, row_start(view, position, row % TILE_HEADS), tangent);
  }
  barrier();
  subtract_mean(sums, view_of(OPERAND_OUT, tile.first_head, LOG2_BYTES), tile.first_position);
  store_query_sums(view_of(OPERAND_DOUT, tile.first_head, LOG2_BYTES), tile.first_position, sums);
}
