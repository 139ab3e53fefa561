#version 460
// Gradient of a tile of queries: dq = sum slope dS k over the keys on its work list.
#define SCORE_PLANES 2
#define TILE_PLANES 2
#include "common/query_kernel.glsl"
#include "common/score_gradient.glsl"

// From the products of a row (plane 0) and dout . v (plane 1) to the gradient of the products.
void update_row(uint row, uint position, bool mixed, QueryState state) {
  for (uint quad = 0; quad < SCORE_QUADS; ++quad) {
    uint index = row * SCORE_STRIDE + quad;
    vec4 value = scores[index], value_product = scores[SCORE_PLANE + index];
    uint key = block_key(quad * 4);
    [[unroll]] for (uint i = 0; i < 4; ++i) {
      Score score = score_of(value[i], position, row % TILE_HEADS, key + i, mixed);
      float weight = probability(score.value, state.logsumexp);
      value[i] = score.slope * score_gradient(weight, value_product[i], state.delta);
    }
    scores[index] = value;
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
  View dout = view_of(OPERAND_DOUT, tile.first_head, LOG2_BYTES);
  uint row = gl_LocalInvocationID.x;
  uint position = tile.first_position + row / TILE_HEADS;
  bool owns_row = row < TILE_ROWS && position < call.queries;
  QueryState state = QueryState(0.0, 0.0);
  if (owns_row) {
    state = load_query_state(view_of(OPERAND_LSE, tile.first_head, 2),
                             view_of(OPERAND_DELTA, tile.first_head, 2), position,
                             row % TILE_HEADS);
  }
  vec4 sums[ACCUMULATORS];
  [[unroll]] for (uint i = 0; i < ACCUMULATORS; ++i) sums[i] = vec4(0);

  for (uint i = 0; i < tile.list.y + tile.list.z; ++i) {
    load_block(OPERAND_LISTS, tile.list.x + i * BLOCK_GRANULES);
    bool mixed = i >= tile.list.y;
    float products[THREAD_SCORES], value_products[THREAD_SCORES];
    clear(products);
    clear(value_products);
    if (has(FEATURE_DOUT)) {
      multiply_query_key(value_products, dout, v, tile.first_position, 1, i > 0);
    }
    multiply_query_key(products, q, k, tile.first_position, 0, i > 0);
    put_products(products, 0);
    put_products(value_products, 1);
    barrier();
    if (owns_row) update_row(row, position, mixed, state);
    multiply_key_block(sums, k, 0, mixed || has(FEATURE_BIAS), true);
  }
  store_query_sums(view_of(OPERAND_DQ, tile.first_head, LOG2_BYTES), tile.first_position, sums);
}
