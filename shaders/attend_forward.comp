#version 460
// Exact attention of a tile of queries to the keys on its work list: out and logsumexp, by online
// softmax in float32.
#define SCORE_PLANES 1
#include "common/query_kernel.glsl"

shared float row_factor[TILE_ROWS];

// State of the softmax of one row, kept by the thread of that index.
float row_maximum = -INFINITY;
float row_sum = 0.0;

// Turns the products of a row into weights; row_factor gets what earlier sums must be scaled by.
void update_row(QueryTile tile, uint first_entry, bool mixed) {
  uint row = gl_LocalInvocationID.x;
  uint position = tile.first_position + row_position(row), head = row_head(row);
  float maximum = row_maximum;
  bool exists = position < PARAMS.queries;
  for (uint quad = 0; quad < SCORE_QUADS && exists; ++quad) {
    vec4 value = scores[row * SCORE_STRIDE + quad];
    uint key = block_key(first_entry, quad * 4);
    [[unroll]] for (uint i = 0; i < 4; ++i) {
      value[i] = score_of(value[i], position, head, key + i, mixed).value;
      maximum = max(maximum, value[i]);
    }
    scores[row * SCORE_STRIDE + quad] = value;
  }
  // While everything is hidden any finite reference gives weights of zero.
  float reference = maximum == -INFINITY ? 0.0 : maximum;
  float factor = exp_accurate(row_maximum - reference);
  float sum = 0.0;
  for (uint quad = 0; quad < SCORE_QUADS && exists; ++quad) {
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
void finish_row(QueryTile tile) {
  uint row = gl_LocalInvocationID.x;
  uint position = tile.first_position + row_position(row), head = row_head(row);
  bool empty = row_sum == 0.0;
  row_factor[row] = empty ? 0.0 : 1.0 / row_sum;
  if (position < PARAMS.queries) {
    View view = view_of(OPERAND_LSE, tile.first_head, 2);
    store_float(view.base, row_start(view, position, head),
                empty ? EMPTY_LOGSUMEXP : row_maximum + log_accurate(row_sum));
  }
}

void main() {
  QueryTile tile;
  if (!locate_query_tile(tile)) return;
  set_scores(tile.first_head);
  View q = view_of(OPERAND_Q, tile.first_head, LOG2_BYTES);
  View k = view_of(OPERAND_K, tile.kv_head, LOG2_BYTES);
  View v = view_of(OPERAND_V, tile.kv_head, LOG2_BYTES);
  vec4 sums[ACCUMULATORS];
  [[unroll]] for (uint i = 0; i < ACCUMULATORS; ++i) sums[i] = vec4(0);

  uint blocks = tile.list.y + tile.list.z;
  for (uint block = 0; block < blocks; ++block) {
    uint first_entry = tile.list.x + block * BLOCK_GRANULES;
    bool mixed = block >= tile.list.y;
    float products[THREAD_SCORES];
    [[unroll]] for (uint i = 0; i < THREAD_SCORES; ++i) products[i] = 0.0;
    multiply_query_key(products, q, k, tile.first_position, first_entry, block > 0);
    put_products(products, 0);
    barrier();
    if (gl_LocalInvocationID.x == 0) block_not_finite = 0;
    if (gl_LocalInvocationID.x < TILE_ROWS) update_row(tile, first_entry, mixed);
    barrier();
    stage_key_block(v, first_entry, 0);
    barrier();
    [[unroll]] for (uint i = 0; i < THREAD_ROWS; ++i) {
      float factor = row_factor[thread_row(i)];
      [[unroll]] for (uint c = 0; c < ACCUMULATORS / THREAD_ROWS; ++c) {
        sums[c * THREAD_ROWS + i] *= factor;
      }
    }
    [[unroll]] for (uint slice = 0; slice < SLICES; ++slice) {
      if (slice > 0) {
        barrier();
        stage_key_block(v, first_entry, slice);
        barrier();
      }
      multiply_scores(sums, 0, slice, mixed || has(FEATURE_BIAS));
    }
  }

  barrier();
  if (gl_LocalInvocationID.x < TILE_ROWS) finish_row(tile);
  barrier();
  View out_view = view_of(OPERAND_OUT, tile.first_head, LOG2_BYTES);
  [[unroll]] for (uint i = 0; i < THREAD_ROWS; ++i) {
    float factor = row_factor[thread_row(i)];
    [[unroll]] for (uint slice = 0; slice < SLICES; ++slice) {
      [[unroll]] for (uint q_ = 0; q_ < THREAD_QUADS; ++q_) {
        vec4 sum = sums[(slice * THREAD_QUADS + q_) * THREAD_ROWS + i];
        // An empty row has sums of zero whatever the values are.
        store_query_quad(out_view, tile.first_position, thread_row(i), sum_column(slice, q_),
                         sum * factor);
      }
    }
  }
}
