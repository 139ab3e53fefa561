#version 460
// Gradients of a tile of keys and values of one head: dk = sum slope dS q, dv = sum P dout over the
// queries on its transposed work list, one chunk of query heads after the other. Rows of the tile
// are keys, or coarse rows of a plan, so that score tiles are transposed.
#define SCORE_PLANES 2
#define TILE_PLANES 2
#include "common/any_thread.glsl"
#include "common/key_parts.glsl"
#include "common/score_gradient.glsl"
#include "common/staging.glsl"

// Of each query of the block; for coarse rows less what the row's level adds to the score (level
// bias) or to dout . v (dshares).
const bool COARSE_TILE = (FEATURES & FEATURE_COARSE_TILE) != 0;
const uint STATE_LEVELS = COARSE_TILE ? 2 : 1;
shared float block_logsumexp[STATE_LEVELS * BLOCK_ROWS];
shared float block_delta[STATE_LEVELS * BLOCK_ROWS];

// Operands of the tile, and of the chunk of query heads at work.
View k, v, q, dout, logsumexp_view, delta_view, level_bias_view, dshares_view;
uint chunk_head;  // counts from the first head that shares the key/value head

vec4 key_sums[ACCUMULATORS], value_sums[ACCUMULATORS];

void set_chunk(uint first_head, uint head) {
  chunk_head = head;
  q = view_of(OPERAND_Q, first_head + head, LOG2_BYTES);
  dout = view_of(OPERAND_DOUT, first_head + head, LOG2_BYTES);
  logsumexp_view = view_of(OPERAND_LSE, first_head + head, 2);
  delta_view = view_of(OPERAND_DELTA, first_head + head, 2);
  if (has(FEATURE_LEVEL_BIAS)) level_bias_view = view_of(OPERAND_LEVEL_BIAS, first_head + head, 2);
  if (has(FEATURE_DSHARES)) dshares_view = view_of(OPERAND_DSHARES, first_head + head, 2);
}

void stage_query_states() {
  for (uint row = gl_LocalInvocationID.x; row < BLOCK_ROWS; row += THREADS) {
    uint position = block_position(row);
    bool exists = position < call.queries;
    uint head = row % TILE_HEADS;
    float logsumexp =
        exists ? load_float(logsumexp_view.base, row_start(logsumexp_view, position, head)) : 0.0;
    // Without a gradient of keys there is no delta.
    float delta = exists && has(FEATURE_DK)
                      ? load_float(delta_view.base, row_start(delta_view, position, head))
                      : 0.0;
    [[unroll]] for (uint level = 0; level < STATE_LEVELS; ++level) {
      float bias = 0.0, cotangent = 0.0;
      if (exists && has(FEATURE_LEVEL_BIAS)) {
        bias = load_float(level_bias_view.base, row_start(level_bias_view, position, head) + level);
      }
      if (exists && has(FEATURE_DSHARES)) {
        cotangent = load_float(dshares_view.base, row_start(dshares_view, position, head) + level);
      }
      block_logsumexp[level * BLOCK_ROWS + row] = logsumexp - bias;
      block_delta[level * BLOCK_ROWS + row] = delta - cotangent;
    }
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

// What the list at work adds to all scores of the row: -inf hides it.
float row_offset = 0.0;

Score key_score_of(float product, uint position, uint head, uint row, bool mixed) {
  if (has(FEATURE_PLAN) && row_offset == -INFINITY) return Score(-INFINITY, 0.0);
  if (!COARSE_TILE) return score_of(product, position, head, row, mixed);
  if (position >= query_limit) return Score(-INFINITY, 0.0);
  Score score = transformed_score(product, position, head, first_key_of(row));
  score.value += row_offset;
  return score;
}

// From the products of a key (plane 0) and dout . v (plane 1) to P and the gradient of the products.
void update_row(uint row, uint key, bool mixed) {
  uint states = COARSE_TILE ? level_index(key) * BLOCK_ROWS : 0;
  for (uint quad = 0; quad < SCORE_QUADS; ++quad) {
    uint index = row * SCORE_STRIDE + quad;
    vec4 weight = scores[index], gradient = scores[SCORE_PLANE + index];
    [[unroll]] for (uint i = 0; i < 4; ++i) {
      uint column = quad * 4 + i;
      Score score = key_score_of(weight[i], block_position(column),
                                 chunk_head + column % TILE_HEADS, key, mixed);
      weight[i] = probability(score.value, block_logsumexp[states + column]);
      gradient[i] =
          score.slope * score_gradient(weight[i], gradient[i], block_delta[states + column]);
    }
    scores[index] = weight;
    scores[SCORE_PLANE + index] = gradient;
  }
}

// Of the queries of the block.
void add_block(uint first_key, bool mixed, bool tiles_are_loaded) {
  bool guard = mixed || has(FEATURE_BIAS);
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
  stage_query_states();
  barrier();
  uint row = gl_LocalInvocationID.x;
  if (row < TILE_ROWS && first_key + row < tile_row_end()) update_row(row, first_key + row, mixed);
  if (has(FEATURE_DV) && has(FEATURE_DOUT)) {
    multiply_query_block(value_sums, dout, 0, guard, has(FEATURE_DK));
  }
  if (has(FEATURE_DK)) multiply_query_block(key_sums, q, 1, guard, !has(FEATURE_DOUT));
}

void add_listed_granules(WorkList list, uint first_key, uint first_head) {
  for (uint head = 0; head < PARAMS.query_heads / PARAMS.kv_heads; head += TILE_HEADS) {
    set_chunk(first_head, head);
    for (uint i = 0; i < list.blocks; ++i) {
      load_block(list, i);
      add_block(first_key, i >= list.full_blocks, i > 0 || head > 0);
    }
  }
}

void add_listed_tiles(PlanList list, uint first_key, uint first_head) {
  bool tiles_are_loaded = false;
  uint row = gl_LocalInvocationID.x;
  bool owns_row = row < TILE_ROWS && first_key + row < tile_row_end();
  for (uint i = 0; i < list.count; ++i) {
    ListedTile tile = listed_tile(list, i);
    if (!tile.exists) continue;
    row_offset = owns_row ? score_offset(first_key + row, tile) : -INFINITY;
    // The query tile was listed for more rows than those of this tile.
    if (!any_thread(row_offset != -INFINITY)) continue;
    set_chunk(first_head, tile.chunk * TILE_HEADS);
    uint first_position = tile.number * PARAMS.plan_positions;
    uint end = min(first_position + PARAMS.plan_positions, call.queries);
    for (; first_position < end; first_position += BLOCK_ROWS / TILE_HEADS) {
      set_query_block(first_position);
      add_block(first_key, true, tiles_are_loaded);
      tiles_are_loaded = true;
    }
  }
}

void main() {
  uint shares = shares_of_head();
  uint entry = workgroup_index() / (shares * PARAMS.kv_heads);
  if (entry >= PARAMS.batch_count) return;
  set_batch(entry);
  start_staging();
  uint kv_head = workgroup_index() / shares % PARAMS.kv_heads;
  uint first_head = kv_head * (PARAMS.query_heads / PARAMS.kv_heads);
  Share share = share_of_head(workgroup_index() % shares);
  uint first_key = share.tile * TILE_ROWS;
  set_scores(first_head);
  k = view_of(COARSE_TILE ? OPERAND_COARSE_K : OPERAND_K, kv_head, LOG2_BYTES);
  v = view_of(COARSE_TILE ? OPERAND_COARSE_V : OPERAND_V, kv_head, LOG2_BYTES);
  [[unroll]] for (uint i = 0; i < ACCUMULATORS; ++i) {
    key_sums[i] = vec4(0);
    value_sums[i] = vec4(0);
  }
  if (has(FEATURE_PLAN)) {
    add_listed_tiles(part_of(plan_list(kv_head, first_key), share), first_key, first_head);
  } else {
    add_listed_granules(key_list(kv_head, share.tile), first_key, first_head);
  }
  if (has(FEATURE_DK)) {
    View view = view_of(COARSE_TILE ? OPERAND_DCOARSE_K : OPERAND_DK, kv_head, LOG2_BYTES);
    store_key_sums(part_view(view, first_key, share.part), first_key, key_sums);
  }
  if (has(FEATURE_DV)) {
    View view = view_of(COARSE_TILE ? OPERAND_DCOARSE_V : OPERAND_DV, kv_head, LOG2_BYTES);
    store_key_sums(part_view(view, first_key, share.part), first_key, value_sums);
  }
}
