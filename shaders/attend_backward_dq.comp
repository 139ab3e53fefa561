#version 460
// Gradient of a tile of queries, dq = sum slope dS k over the keys on its work list, and of the
// biases of coarse rows by level.
#define SCORE_PLANES 2
#define TILE_PLANES 2
#include "common/query_kernel.glsl"
#include "common/score_gradient.glsl"

// Of the row kept by the thread of that index.
QueryState row_state = QueryState(0.0, 0.0);
vec2 row_level_bias, row_level_cotangents;  // dshares
vec2 row_level_gradients = vec2(0);

// From the products of a row (plane 0) and dout . v (plane 1) to the gradient of the products.
void update_row(uint row, uint position, bool mixed) {
  uint head = row % TILE_HEADS;
  for (uint quad = 0; quad < SCORE_QUADS; ++quad) {
    uint index = row * SCORE_STRIDE + quad;
    vec4 value = scores[index], value_product = scores[SCORE_PLANE + index];
    uint key = block_key(quad * 4);
    [[unroll]] for (uint i = 0; i < 4; ++i) {
      if (block_is_coarse) {
        uint level = level_index(block_coarse_rows[quad * 4 + i]);
        Score score = coarse_score_of(value[i], position, head, quad * 4 + i, row_level_bias);
        float weight = probability(score.value, row_state.logsumexp);
        float gradient = score_gradient(weight, value_product[i],
                                        row_state.delta - row_level_cotangents[level]);
        row_level_gradients[level] += gradient;
        value[i] = score.slope * gradient;
      } else {
        Score score = score_of(value[i], position, head, key + i, mixed);
        float weight = probability(score.value, row_state.logsumexp);
        value[i] = score.slope * score_gradient(weight, value_product[i], row_state.delta);
      }
    }
    scores[index] = value;
  }
}

struct Operands {
  View q;
  View dout;
  View k;
  View v;
};

void add_block(inout vec4 sums[ACCUMULATORS], Operands operands, uint first_position, bool mixed,
               bool tiles_are_loaded) {
  uint row = gl_LocalInvocationID.x, position = first_position + row / TILE_HEADS;
  float products[THREAD_SCORES], value_products[THREAD_SCORES];
  clear(products);
  clear(value_products);
  if (has(FEATURE_DOUT)) {
    multiply_query_key(value_products, operands.dout, operands.v, first_position, 1,
                       tiles_are_loaded);
  }
  multiply_query_key(products, operands.q, operands.k, first_position, 0, tiles_are_loaded);
  put_products(products, 0);
  put_products(value_products, 1);
  barrier();
  if (row < TILE_ROWS && position < call.queries) update_row(row, position, mixed);
  multiply_key_block(sums, operands.k, 0, mixed || has(FEATURE_BIAS), true);
}

void main() {
  QueryTile tile;
  if (!locate_query_tile(workgroup_index(), tile)) return;
  start_staging();
  set_scores(tile.first_head);
  Operands operands = Operands(view_of(OPERAND_Q, tile.first_head, LOG2_BYTES),
                               view_of(OPERAND_DOUT, tile.first_head, LOG2_BYTES),
                               view_of(OPERAND_K, tile.kv_head, LOG2_BYTES),
                               view_of(OPERAND_V, tile.kv_head, LOG2_BYTES));
  uint row = gl_LocalInvocationID.x, head = row % TILE_HEADS;
  uint position = tile.first_position + row / TILE_HEADS;
  bool owns_row = row < TILE_ROWS && position < call.queries;
  if (owns_row) {
    row_state = load_query_state(view_of(OPERAND_LSE, tile.first_head, 2),
                                 view_of(OPERAND_DELTA, tile.first_head, 2), position, head);
  }
  vec4 sums[ACCUMULATORS];
  [[unroll]] for (uint i = 0; i < ACCUMULATORS; ++i) sums[i] = vec4(0);

  for (uint i = 0; i < tile.list.blocks; ++i) {
    load_block(tile.list, i);
    add_block(sums, operands, tile.first_position, i >= tile.list.full_blocks, i > 0);
  }
  if (has(FEATURE_PLAN)) {
    row_level_bias = load_levels_pair(OPERAND_LEVEL_BIAS, owns_row && has(FEATURE_LEVEL_BIAS),
                                      tile.first_head, position, head);
    row_level_cotangents = load_levels_pair(OPERAND_DSHARES, owns_row && has(FEATURE_DSHARES),
                                            tile.first_head, position, head);
    operands.k = view_of(OPERAND_COARSE_K, tile.kv_head, LOG2_BYTES);
    operands.v = view_of(OPERAND_COARSE_V, tile.kv_head, LOG2_BYTES);
    for (uint i = 0; i < coarse_blocks(tile.list); ++i) {
      load_coarse_block(tile.list, i);
      add_block(sums, operands, tile.first_position, true, i + tile.list.blocks > 0);
    }
    if (owns_row && has(FEATURE_DLEVEL_BIAS)) {
      store_levels_pair(OPERAND_DLEVEL_BIAS, tile.first_head, position, head, row_level_gradients);
    }
  }
  if (has(FEATURE_DQ)) {
    store_query_sums(view_of(OPERAND_DQ, tile.first_head, LOG2_BYTES), tile.first_position, sums);
  }
}
