#version 460
// Attention of a tile of queries to the keys, and the coarse rows of a plan, on its work list: out,
// logsumexp and the shares of coarse rows, by online softmax in float32.
#define SCORE_PLANES 1
#define TILE_PLANES 1
#include "common/query_kernel.glsl"
#include "common/query_parts.glsl"

shared float row_factor[TILE_ROWS];

// State of the softmax of one row, kept by the thread of that index.
float row_maximum = -INFINITY;
float row_sum = 0.0;
vec2 row_level_sums = vec2(0);  // of coarse rows
vec2 row_level_bias;
uvec2 row_counts = uvec2(0);

float block_score(float product, uint position, uint head, uint column, uint key, bool mixed) {
  if (block_is_coarse) {
    if (has(FEATURE_ROW_COUNTS)) row_counts.y += block_coarse_rows[column] != NO_ROW ? 1 : 0;
    return coarse_score_of(product, position, head, column, row_level_bias).value;
  }
  if (has(FEATURE_ROW_COUNTS)) row_counts.x += key < call.keys ? 1 : 0;
  return score_of(product, position, head, key, mixed).value;
}

// Turns the products of a row into weights; row_factor gets what earlier sums must be scaled by.
void update_row(uint row, uint position, bool mixed) {
  float maximum = row_maximum;
  for (uint quad = 0; quad < SCORE_QUADS; ++quad) {
    vec4 value = scores[row * SCORE_STRIDE + quad];
    uint key = block_key(quad * 4);
    [[unroll]] for (uint i = 0; i < 4; ++i) {
      value[i] = block_score(value[i], position, row % TILE_HEADS, quad * 4 + i, key + i, mixed);
      maximum = max(maximum, value[i]);
    }
    scores[row * SCORE_STRIDE + quad] = value;
  }
  // While everything is hidden any finite reference gives weights of zero.
  float reference = maximum == -INFINITY ? 0.0 : maximum;
  float factor = exp_accurate(row_maximum - reference);
  float sum = 0.0;
  vec2 level_sums = vec2(0);
  for (uint quad = 0; quad < SCORE_QUADS; ++quad) {
    vec4 value = scores[row * SCORE_STRIDE + quad];
    [[unroll]] for (uint i = 0; i < 4; ++i) {
      value[i] = exp_accurate(value[i] - reference);
      if (block_is_coarse) level_sums[level_index(block_coarse_rows[quad * 4 + i])] += value[i];
    }
    sum += (value.x + value.y) + (value.z + value.w);
    scores[row * SCORE_STRIDE + quad] = value;
  }
  row_maximum = maximum;
  row_sum = fma(row_sum, factor, sum);
  if (block_is_coarse) row_level_sums = fma(row_level_sums, vec2(factor), level_sums);
  row_factor[row] = factor;
}

// Writes the statistics of a row; row_factor gets what its sums must be scaled by.
void finish_row(uint row, uint position, uint first_head, uint part) {
  uint head = row % TILE_HEADS;
  bool empty = row_sum == 0.0;
  row_factor[row] = empty ? 0.0 : 1.0 / row_sum;
  vec2 shares = row_level_sums * row_factor[row];
  if (LIST_PARTS > 1) {
    record_of(first_head + head, position, part).quad[OUT_QUADS] =
        floatBitsToUint(vec4(row_maximum, row_sum, shares));
    return;
  }
  View view = view_of(OPERAND_LSE, first_head, 2);
  store_float(view.base, row_start(view, position, head),
              empty ? EMPTY_LOGSUMEXP : row_maximum + log_accurate(row_sum));
  if (has(FEATURE_SHARES)) store_levels_pair(OPERAND_SHARES, first_head, position, head, shares);
  if (has(FEATURE_ROW_COUNTS)) {
    View counts_view = view_of(OPERAND_ROW_COUNTS, first_head, 2);
    uint start = row_start(counts_view, position, head);
    Words(counts_view.base).word[start] = row_counts.x;
    Words(counts_view.base).word[start + 1] = row_counts.y;
  }
}

void scale_sums(inout vec4 sums[ACCUMULATORS]) {
  [[unroll]] for (uint i = 0; i < THREAD_ROWS; ++i) {
    float factor = row_factor[thread_row(i)];
    [[unroll]] for (uint c = 0; c < ACCUMULATORS / THREAD_ROWS; ++c) {
      sums[c * THREAD_ROWS + i] *= factor;
    }
  }
}

// The sums of the tile's rows, to their records.
void record_sums(QueryTile tile, uint part, vec4 sums[ACCUMULATORS]) {
  [[unroll]] for (uint i = 0; i < THREAD_ROWS; ++i) {
    uint position = tile.first_position + thread_row(i) / TILE_HEADS;
    if (position >= call.queries) continue;
    Quads record = record_of(tile.first_head + thread_row(i) % TILE_HEADS, position, part);
    [[unroll]] for (uint slice = 0; slice < SLICES; ++slice) {
      [[unroll]] for (uint q = 0; q < THREAD_QUADS; ++q) {
        uint quad = sum_column(slice, q) / 4;
        if (quad < OUT_QUADS) record.quad[quad] = floatBitsToUint(sums[sum_index(slice, q, i)]);
      }
    }
  }
}

void attend_block(inout vec4 sums[ACCUMULATORS], View q, View k, View v, QueryTile tile,
                  bool mixed, bool tile_is_loaded) {
  uint row = gl_LocalInvocationID.x;
  uint position = tile.first_position + row / TILE_HEADS;
  float products[THREAD_SCORES];
  clear(products);
  multiply_query_key(products, q, k, tile.first_position, 0, tile_is_loaded);
  put_products(products, 0);
  barrier();
  if (row < TILE_ROWS && position < call.queries) update_row(row, position, mixed);
  barrier();
  scale_sums(sums);
  multiply_key_block(sums, v, 0, mixed || has(FEATURE_BIAS), false);
}

void main() {
  QueryTile tile;
  uint part = workgroup_index() % LIST_PARTS;
  if (!locate_query_tile(workgroup_index() / LIST_PARTS, tile)) return;
  if (LIST_PARTS > 1) tile.list = part_of(tile.list, part);
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

  for (uint i = 0; i < tile.list.blocks; ++i) {
    load_block(tile.list, i);
    attend_block(sums, q, k, v, tile, i >= tile.list.full_blocks, i > 0);
  }
  if (has(FEATURE_PLAN)) {
    row_level_bias = load_levels_pair(OPERAND_LEVEL_BIAS, owns_row && has(FEATURE_LEVEL_BIAS),
                                      tile.first_head, position, row % TILE_HEADS);
    View coarse_k = view_of(OPERAND_COARSE_K, tile.kv_head, LOG2_BYTES);
    View coarse_v = view_of(OPERAND_COARSE_V, tile.kv_head, LOG2_BYTES);
    for (uint i = 0; i < coarse_blocks(tile.list); ++i) {
      load_coarse_block(tile.list, i);
      attend_block(sums, q, coarse_k, coarse_v, tile, true, i + tile.list.blocks > 0);
    }
  }

  barrier();
  if (owns_row) finish_row(row, position, tile.first_head, part);
  barrier();
  scale_sums(sums);
  if (LIST_PARTS > 1) {
    record_sums(tile, part, sums);
    return;
  }
  store_query_sums(view_of(OPERAND_OUT, tile.first_head, LOG2_BYTES), tile.first_position, sums);
}
