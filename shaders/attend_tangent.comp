#version 460
// Forward-mode derivative of attention, for a tile of queries:
//   P = exp(s - logsumexp), dS = slope (dq . k + q . dk) + dbias, m = sum P dS,
//   dlogsumexp = m, dout = sum P (dS v + dv) - m out;
// coarse rows have dlevel_bias besides, and dshares = sum P dS - m shares of those of a level.
#define SCORE_PLANES 2
#define TILE_PLANES 2
#include "common/query_kernel.glsl"

shared float row_tangent[TILE_ROWS];  // m

View bias_tangent_view;

// Of the row kept by the thread of that index.
float row_logsumexp = 0.0;
vec2 row_level_bias, row_level_bias_tangent;
vec2 row_level_tangents = vec2(0);  // sums of P dS over coarse rows

// The tangent of what is added to a product.
float bias_tangent(uint position, uint head, uint key) {
  return load_element(bias_tangent_view.base,
                      row_start(bias_tangent_view, position, head) +
                          key * bias_tangent_view.column_stride,
                      BIAS_DTYPE);
}

// From the products of a row (plane 0) and their tangents (plane 1) to P and P dS.
float update_row(uint row, uint position, bool mixed) {
  float tangent = 0.0;
  uint head = row % TILE_HEADS;
  for (uint quad = 0; quad < SCORE_QUADS; ++quad) {
    uint index = row * SCORE_STRIDE + quad;
    vec4 weight = scores[index], weighted = scores[SCORE_PLANE + index];
    uint key = block_key(quad * 4);
    [[unroll]] for (uint i = 0; i < 4; ++i) {
      uint column = quad * 4 + i;
      Score score = block_is_coarse
                        ? coarse_score_of(weight[i], position, head, column, row_level_bias)
                        : score_of(weight[i], position, head, key + i, mixed);
      weight[i] = probability(score.value, row_logsumexp);
      float change = score.slope * weighted[i];
      if (has(FEATURE_DBIAS) && weight[i] != 0.0) {
        uint bias_key = block_is_coarse ? first_key_of(block_coarse_rows[column]) : key + i;
        change += bias_tangent(position, head, bias_key);
      }
      if (block_is_coarse) {
        uint level = level_index(block_coarse_rows[column]);
        change += row_level_bias_tangent[level];
        row_level_tangents[level] += weight[i] == 0.0 ? 0.0 : weight[i] * change;
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

struct Operands {
  View q;
  View dq;
  View k;
  View v;
  View dk;
  View dv;
};

float add_block(inout vec4 sums[ACCUMULATORS], Operands operands, uint first_position, bool mixed,
                bool tiles_are_loaded, bool has_dk, bool has_dv) {
  bool moves_scores = has_dk || has(FEATURE_DQ | FEATURE_DBIAS) ||
                      (block_is_coarse && has(FEATURE_DLEVEL_BIAS));
  bool guard = mixed || has(FEATURE_BIAS);
  uint row = gl_LocalInvocationID.x, position = first_position + row / TILE_HEADS;
  float products[THREAD_SCORES], changes[THREAD_SCORES], tangent = 0.0;
  clear(products);
  clear(changes);
  multiply_query_key(products, operands.q, operands.k, first_position, 0, tiles_are_loaded);
  if (has_dk) multiply_query_key(changes, operands.q, operands.dk, first_position, 0, true);
  if (has(FEATURE_DQ)) {
    multiply_query_key(changes, operands.dq, operands.k, first_position, 1, tiles_are_loaded);
  }
  put_products(products, 0);
  put_products(changes, 1);
  barrier();
  if (row < TILE_ROWS && position < call.queries) tangent = update_row(row, position, mixed);
  if (has_dv) multiply_key_block(sums, operands.dv, 0, guard, false);
  if (moves_scores) multiply_key_block(sums, operands.v, 1, guard, false);
  return tangent;
}

void main() {
  QueryTile tile;
  if (!locate_query_tile(workgroup_index(), tile)) return;
  start_staging();
  set_scores(tile.first_head);
  Operands operands = Operands(view_of(OPERAND_Q, tile.first_head, LOG2_BYTES),
                               view_of(OPERAND_DQ, tile.first_head, LOG2_BYTES),
                               view_of(OPERAND_K, tile.kv_head, LOG2_BYTES),
                               view_of(OPERAND_V, tile.kv_head, LOG2_BYTES),
                               view_of(OPERAND_DK, tile.kv_head, LOG2_BYTES),
                               view_of(OPERAND_DV, tile.kv_head, LOG2_BYTES));
  View logsumexp_view = view_of(OPERAND_LSE, tile.first_head, 2);
  if (has(FEATURE_DBIAS)) {
    bias_tangent_view = view_of(OPERAND_DBIAS, tile.first_head, BIAS_LOG2_BYTES);
  }
  uint row = gl_LocalInvocationID.x, head = row % TILE_HEADS;
  uint position = tile.first_position + row / TILE_HEADS;
  bool owns_row = row < TILE_ROWS && position < call.queries;
  if (owns_row) {
    row_logsumexp = load_float(logsumexp_view.base, row_start(logsumexp_view, position, head));
  }
  float tangent = 0.0;
  vec4 sums[ACCUMULATORS];
  [[unroll]] for (uint i = 0; i < ACCUMULATORS; ++i) sums[i] = vec4(0);

  for (uint i = 0; i < tile.list.blocks; ++i) {
    load_block(tile.list, i);
    tangent += add_block(sums, operands, tile.first_position, i >= tile.list.full_blocks, i > 0,
                         has(FEATURE_DK), has(FEATURE_DV));
  }
  if (has(FEATURE_PLAN)) {
    row_level_bias = load_levels_pair(OPERAND_LEVEL_BIAS, owns_row && has(FEATURE_LEVEL_BIAS),
                                      tile.first_head, position, head);
    row_level_bias_tangent =
        load_levels_pair(OPERAND_DLEVEL_BIAS, owns_row && has(FEATURE_DLEVEL_BIAS),
                         tile.first_head, position, head);
    operands.k = view_of(OPERAND_COARSE_K, tile.kv_head, LOG2_BYTES);
    operands.v = view_of(OPERAND_COARSE_V, tile.kv_head, LOG2_BYTES);
    operands.dk = view_of(OPERAND_DCOARSE_K, tile.kv_head, LOG2_BYTES);
    operands.dv = view_of(OPERAND_DCOARSE_V, tile.kv_head, LOG2_BYTES);
    for (uint i = 0; i < coarse_blocks(tile.list); ++i) {
      load_coarse_block(tile.list, i);
      tangent += add_block(sums, operands, tile.first_position, true, i + tile.list.blocks > 0,
                           has(FEATURE_DCOARSE_K), has(FEATURE_DCOARSE_V));
    }
  }

  if (owns_row) {
    row_tangent[row] = tangent;
    View view = view_of(OPERAND_DLSE, tile.first_head, 2);
    store_float(view.base, row_start(view, position, head), tangent);
    if (has(FEATURE_PLAN)) {
      vec2 shares = load_levels_pair(OPERAND_SHARES, true, tile.first_head, position, head);
      store_levels_pair(OPERAND_DSHARES, tile.first_head, position, head,
                        row_level_tangents - tangent * shares);
    }
  }
  barrier();
  subtract_mean(sums, view_of(OPERAND_OUT, tile.first_head, LOG2_BYTES), tile.first_position);
  store_query_sums(view_of(OPERAND_DOUT, tile.first_head, LOG2_BYTES), tile.first_position, sums);
}
