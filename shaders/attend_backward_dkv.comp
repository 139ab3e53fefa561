#version 460
// Gradients of a tile of keys and values of one head: dk = sum slope dS q, dv = sum P dout over the
// queries on its transposed work list, one chunk of query heads after the other. Rows of the tile
// are keys, so that score tiles are transposed.
#define SCORE_PLANES 2
#define TILE_PLANES 2
#include "common/score_gradient.glsl"
#include "common/staging.glsl"

shared float block_logsumexp[BLOCK_ROWS];
shared float block_delta[BLOCK_ROWS];

// The chunk of query heads at work; heads count from the first that shares the key/value head.
uint chunk_head;

void stage_query_states(View logsumexp_view, View delta_view) {
  for (uint row = gl_LocalInvocationID.x; row < BLOCK_ROWS; row += THREADS) {
    uint position = block_position(row);
    bool exists = position < call.queries;
    uint head = row % TILE_HEADS;
    block_logsumexp[row] =
        exists ? load_float(logsumexp_view.base, row_start(logsumexp_view, position, head)) : 0.0;
    // Without a gradient of keys there is no delta.
    block_delta[row] = exists && has(FEATURE_DK)
                           ? load_float(delta_view.base, row_start(delta_view, position, head))
                           : 0.0;
  }
}

void multiply_key_query(out float products[THREAD_SCORES], View tile_view, View block_view,
                        uint first_key, uint plane, bool tile_is_loaded) {
  plane = SLICES > 1 ? 0 : plane;
  [[unroll]] for (uint i = 0; i < THREAD_SCORES; ++i) products[i] = 0.0;
  for (uint slice = 0; slice < SLICES; ++slice) {
    barrier();
    if (SLICES > 1 || !tile_is_loaded) stage_key_tile(tile_view, first_key, slice, plane);
    stage_query_block(block_view, slice);
    barrier();
    multiply_rows(products, slice, plane);
  }
}

void multiply_query_slice(inout vec4 sums[ACCUMULATORS], View view, uint plane, bool guard,
                          bool block_is_loaded, uint slice) {
  barrier();
  if (SLICES > 1 || !block_is_loaded) {
    stage_query_block(view, slice);
    barrier();
  }
  multiply_scores(sums, plane, slice, guard);
}

// As multiply_key_block of common/query_kernel.glsl.
void multiply_query_block(inout vec4 sums[ACCUMULATORS], View view, uint plane, bool guard,
                          bool block_is_loaded) {
  multiply_query_slice(sums, view, plane, guard, block_is_loaded, 0);
  if (SLICES > 1) multiply_query_slice(sums, view, plane, guard, false, 1);
  if (SLICES > 2) multiply_query_slice(sums, view, plane, guard, false, 2);
  if (SLICES > 3) multiply_query_slice(sums, view, plane, guard, false, 3);
}

// From the products of a key (plane 0) and dout . v (plane 1) to P and the gradient of the products.
void update_row(uint row, uint key, bool mixed) {
  for (uint quad = 0; quad < SCORE_QUADS; ++quad) {
    uint index = row * SCORE_STRIDE + quad;
    vec4 weight = scores[index], gradient = scores[SCORE_PLANE + index];
    [[unroll]] for (uint i = 0; i < 4; ++i) {
      uint column = quad * 4 + i;
      Score score = score_of(weight[i], block_position(column),
                             chunk_head + column % TILE_HEADS, key, mixed);
      weight[i] = probability(score.value, block_logsumexp[column]);
      gradient[i] = score.slope * score_gradient(weight[i], gradient[i], block_delta[column]);
    }
    scores[index] = weight;
    scores[SCORE_PLANE + index] = gradient;
  }
}

void store_key_sums(View view, uint first_key, vec4 sums[ACCUMULATORS]) {
  [[unroll]] for (uint i = 0; i < THREAD_ROWS; ++i) {
    uint start = key_row_start(view, first_key + thread_row(i));
    if (start == ABSENT_ROW) continue;
    [[unroll]] for (uint slice = 0; slice < SLICES; ++slice) {
      [[unroll]] for (uint q = 0; q < THREAD_QUADS; ++q) {
        store_columns(view.base, start, sum_column(slice, q), sums[sum_index(slice, q, i)]);
      }
    }
  }
}

void main() {
  uint tiles = divide_up(PARAMS.keys, TILE_ROWS);
  uint entry = workgroup_index() / (tiles * PARAMS.kv_heads);
  if (entry >= PARAMS.batch_count) return;
  set_batch(entry);
  start_staging();
  uint kv_head = workgroup_index() / tiles % PARAMS.kv_heads;
  uint tile = workgroup_index() % tiles;
  uint group = PARAMS.query_heads / PARAMS.kv_heads;
  uint first_key = tile * TILE_ROWS;
  set_scores(kv_head * group);
  View k = view_of(OPERAND_K, kv_head, LOG2_BYTES);
  View v = view_of(OPERAND_V, kv_head, LOG2_BYTES);
  uint list_tile = (batch_list() + kv_head * PARAMS.key_list_head_stride) * tiles + tile;
  uvec4 list = list_header(OPERAND_KEY_LISTS, list_tile);
  uint row = gl_LocalInvocationID.x;
  bool owns_row = row < TILE_ROWS && first_key + row < call.keys;
  vec4 key_sums[ACCUMULATORS], value_sums[ACCUMULATORS];
  [[unroll]] for (uint i = 0; i < ACCUMULATORS; ++i) {
    key_sums[i] = vec4(0);
    value_sums[i] = vec4(0);
  }

  for (chunk_head = 0; chunk_head < group; chunk_head += TILE_HEADS) {
    uint head = kv_head * group + chunk_head;
    View q = view_of(OPERAND_Q, head, LOG2_BYTES);
    View dout = view_of(OPERAND_DOUT, head, LOG2_BYTES);
    View logsumexp_view = view_of(OPERAND_LSE, head, 2);
    View delta_view = view_of(OPERAND_DELTA, head, 2);
    for (uint i = 0; i < list.y + list.z; ++i) {
      load_block(OPERAND_KEY_LISTS, list.x + i * BLOCK_GRANULES);
      bool mixed = i >= list.y;
      bool guard = mixed || has(FEATURE_BIAS);
      bool tiles_are_loaded = i > 0 || chunk_head > 0;
      float products[THREAD_SCORES];
      multiply_key_query(products, k, q, first_key, 0, tiles_are_loaded);
      put_products(products, 0);
      if (has(FEATURE_DK)) {
        if (has(FEATURE_DOUT)) {
          multiply_key_query(products, v, dout, first_key, 1, tiles_are_loaded);
        } else {
          [[unroll]] for (uint j = 0; j < THREAD_SCORES; ++j) products[j] = 0.0;
        }
        put_products(products, 1);
      }
      stage_query_states(logsumexp_view, delta_view);
      barrier();
      if (owns_row) update_row(row, first_key + row, mixed);
      if (has(FEATURE_DV) && has(FEATURE_DOUT)) {
        multiply_query_block(value_sums, dout, 0, guard, has(FEATURE_DK));
      }
      if (has(FEATURE_DK)) multiply_query_block(key_sums, q, 1, guard, !has(FEATURE_DOUT));
    }
  }
  if (has(FEATURE_DK)) {
    store_key_sums(view_of(OPERAND_DK, kv_head, LOG2_BYTES), first_key, key_sums);
  }
  if (has(FEATURE_DV)) {
    store_key_sums(view_of(OPERAND_DV, kv_head, LOG2_BYTES), first_key, value_sums);
  }
}
