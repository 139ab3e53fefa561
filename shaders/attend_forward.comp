#version 460
// Exact attention of a tile of queries to the keys on its work list: out and logsumexp, by online
// softmax in float32.
#define SCORE_PLANES 1
#define TILE_PLANES 1
#include "common/query_kernel.glsl"

shared float row_factor[TILE_ROWS];

// State of the softmax of one row, kept by the thread of that index.
float row_maximum = -INFINITY;
float row_sum = 0.0;

// Turns the products of a row into weights; row_factor gets what earlier sums must be scaled by.
void update_row(uint row, uint position, bool mixed) {
  float maximum = row_maximum;
  for (uint quad = 0; quad < SCORE_QUADS; ++quad) {
    vec4 value = scores[row * SCORE_STRIDE + quad];
    uint key = block_key(quad * 4);
    [[unroll]] for (uint i = 0; i < 4; ++i) {
      value[i] = score_of(value[i], position, row % TILE_HEADS, key + i, mixed).value;
      maximum = max(maximum, value[i]);
    }
    scores[row * SCORE_STRIDE + quad] = value;
  }
  // While everything is hidden any finite reference gives weights of zero.
  float reference = maximum == -INFINITY ? 0.0 : maximum;
  float factor = exp_accurate(row_maximum - reference);
  float sum = 0.0;
  for (uint quad = 0; quad < SCORE_QUADS; ++quad) {
    vec4 value = scores[row * SCORE_STRIDE + quad];
    [[unroll]] for (uint i = 0; i < 4; ++i) value[i] = exp_accurate(value[i] - reference);
    sum += (value.x + value.y) + (value.z + value.w);
    scores[row * SCORE_STRIDE + quad] = value;
  }
  row_maximum = maximum;
  row_sum = fma(row_sum, factor, sum);
  row_factor[row] = factor;
}

// Writes the logsumexp of a row; row_factor gets what its sums must be scaled by.
void finish_row(uint row, uint position, uint first_head) {
  bool empty = row_sum == 0.0;
  row_factor[row] = empty ? 0.0 : 1.0 / row_sum;
  View view = view_of(OPERAND_LSE, first_head, 2);
  store_float(view.base, row_start(view, position, row % TILE_HEADS),
              empty ? EMPTY_LOGSUMEXP : row_maximum + log_accurate(row_sum));
}

void scale_sums(inout vec4 sums[ACCUMULATORS]) {
  [[unroll]] for (uint i = 0; i < THREAD_ROWS; ++i) {
    float factor = row_factor[thread_row(i)];
    [[unroll]] for (uint c = 0; c < ACCUMULATORS / THREAD_ROWS; ++c) {
      sums[c * THREAD_ROWS + i] *= factor;
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
  uint row = gl_LocalInvocationID.x;
  uint position = tile.first_position + row / TILE_HEADS;
  bool owns_row = row < TILE_ROWS && position < call.queries;
  if (row < TILE_ROWS) row_factor[row] = 0.0;
  vec4 sums[ACCUMULATORS];
  [[unroll]] for (uint i = 0; i < ACCUMULATORS; ++i) sums[i] = vec4(0);

  for (uint i = 0; i < tile.list.y + tile.list.z; ++i) {
    load_block(OPERAND_LISTS, tile.list.x + i * BLOCK_GRANULES);
    bool mixed = i >= tile.list.y;
    float products[THREAD_SCORES];
    clear(products);
    multiply_query_key(products, q, k, tile.first_position, 0, i > 0);
    put_products(products, 0);
    barrier();
    if (owns_row) update_row(row, position, mixed);
    barrier();
    scale_sums(sums);
    multiply_key_block(sums, v, 0, mixed || has(FEATURE_BIAS), false);
  }

  barrier();
  if (owns_row) finish_row(row, position, tile.first_head);
  barrier();
  scale_sums(sums);
  store_query_sums(view_of(OPERAND_OUT, tile.first_head, LOG2_BYTES), tile.first_position, sums);
}
