#version 460
// Gradient of bias: dbias = dS, summed over the axes along which the gradient has no stride. A
// workgroup owns TILE_ROWS x BLOCK_ROWS of the gradient and walks all that is summed in a fixed
// order, so that the sums are the same every time. TILE_HEADS is 1 here.
//
// With a plan the dS of a coarse row belongs to the bias of its first key. Tiles are not those of
// the plan, so each query looks up in the levels map what it sees; what no query of a tile sees is
// not multiplied.
#define SCORE_PLANES 3
#define TILE_PLANES 1
#define STORE_16_BITS
#include "common/any_thread.glsl"
#include "common/query_kernel.glsl"
#include "common/score_gradient.glsl"

#define SUM_PLANE 2

struct Place {
  uint head;
  uint first_position;
  uint first_key;
  uint first_coarse_row;  // of a block of these, where keys are summed; else NO_ROW
};

bool sums_keys() { return PARAMS.operand[OPERAND_DBIAS].column_stride == 0; }

// The coordinate along an axis: of the tile that is owned, or of the term of its sum.
uint coordinate(bool summed, uint extent, inout uint owned, inout uint term) {
  uint value = summed ? term % extent : owned % extent;
  if (summed) {
    term /= extent;
  } else {
    owned /= extent;
  }
  return value;
}

// Sets the batch entry too. Afterwards `owned` is 0 if there is such a tile, and `term` is 0 if its
// sum has such a term.
Place locate(inout uint owned, inout uint term) {
  Place place;
  uint blocks = divide_up(call.keys, BLOCK_ROWS), tiles = divide_up(call.queries, TILE_ROWS);
  bool summed = sums_keys();
  uint coarse = summed && has(FEATURE_PLAN) ? divide_up(PARAMS.coarse_rows, BLOCK_ROWS) : 0;
  uint block = coordinate(summed, blocks + coarse, owned, term);
  place.first_key = block * BLOCK_ROWS;
  place.first_coarse_row = block < blocks ? NO_ROW : (block - blocks) * BLOCK_ROWS;
  summed = PARAMS.operand[OPERAND_DBIAS].row_stride == 0;
  place.first_position = coordinate(summed, tiles, owned, term) * TILE_ROWS;
  summed = PARAMS.operand[OPERAND_DBIAS].head_stride == 0;
  place.head = coordinate(summed, PARAMS.query_heads, owned, term);
  for (int axis = MAX_BATCH_AXES - 1; axis >= 0; --axis) {
    summed = PARAMS.operand[OPERAND_DBIAS].batch_stride[axis] == 0;
    batch_index[axis] = coordinate(summed, PARAMS.batch[axis], owned, term);
  }
  return place;
}

// What a query, one a thread, has besides under a plan.
View row_levels;
vec2 row_level_bias, row_level_cotangents;  // dshares

// The coarse row in a column of the block at work. Of a block of keys these are the means of its
// granules, then of the super-tile that begins there.
uint coarse_row_at(Place place, uint column) {
  uint granules = granule_count();
  if (place.first_coarse_row != NO_ROW) {
    uint row = place.first_coarse_row + column;
    return row < PARAMS.coarse_rows ? row : NO_ROW;
  }
  if (column < BLOCK_GRANULES) {
    uint granule = place.first_key / GRANULE_ROWS + column;
    return granule < granules ? granule : NO_ROW;
  }
  const uint super_tile_keys = SUPER_TILE_GRANULES * GRANULE_ROWS;
  bool begins = column == BLOCK_GRANULES && place.first_key % super_tile_keys == 0;
  return begins ? granules + place.first_key / super_tile_keys : NO_ROW;
}

void set_coarse_block(Place place) {
  block_is_coarse = true;
  barrier();
  for (uint i = gl_LocalInvocationID.x; i < BLOCK_ROWS; i += THREADS) {
    block_coarse_rows[i] = coarse_row_at(place, i);
  }
  barrier();
}

// Number of keys that the query sees by a column of the block, a key or a coarse row.
uint keys_seen(uint column) {
  if (block_is_coarse) {
    uint row = block_coarse_rows[column];
    return row == NO_ROW ? 0 : coarse_row_keys(row_levels, row);
  }
  uint key = block_key(column);
  if (key >= call.keys) return 0;
  return granule_level(row_levels, key / GRANULE_ROWS) == LEVEL_EXACT ? 1 : 0;
}

// Whether any query of the tile sees anything of the block.
bool block_is_seen(bool owns_row) {
  if (!has(FEATURE_PLAN)) return true;
  bool seen = false;
  for (uint i = 0; owns_row && !seen && i < BLOCK_ROWS; i += block_is_coarse ? 1 : GRANULE_ROWS) {
    seen = keys_seen(i) > 0;
  }
  return any_thread(seen);
}

float gradient_at(uint column, float product, float value_product, uint position,
                  QueryState state) {
  if (!block_is_coarse) {
    Score score = score_of(product, position, 0, block_key(column), true);
    float weight = probability(score.value, state.logsumexp);
    return score_gradient(weight, value_product, state.delta);
  }
  uint keys = keys_seen(column);
  if (keys == 0 || position >= query_limit) return 0.0;
  uint row = block_coarse_rows[column], level = level_index(row);
  float score = transformed_score(product, position, 0, first_key_of(row)).value +
                log_accurate(float(keys)) + row_level_bias[level];
  return score_gradient(probability(score, state.logsumexp), value_product,
                        state.delta - row_level_cotangents[level]);
}

// Adds dS of a row to its sums.
void add_row(uint row, uint position, Place place, QueryState state) {
  for (uint quad = 0; quad < SCORE_QUADS; ++quad) {
    // The keys of a quad are of one granule.
    if (has(FEATURE_PLAN) && !block_is_coarse && keys_seen(quad * 4) == 0) continue;
    uint index = row * SCORE_STRIDE + quad;
    vec4 product = scores[index], value_product = scores[SCORE_PLANE + index], gradient;
    [[unroll]] for (uint i = 0; i < 4; ++i) {
      gradient[i] = gradient_at(quad * 4 + i, product[i], value_product[i], position, state);
    }
    if (!block_is_coarse || sums_keys()) {
      scores[SUM_PLANE * SCORE_PLANE + index] += gradient;
      continue;
    }
    [[unroll]] for (uint i = 0; i < 4; ++i) {
      uint coarse_row = block_coarse_rows[quad * 4 + i];
      if (coarse_row == NO_ROW) continue;
      uint column = first_key_of(coarse_row) - place.first_key;
      index = row * SCORE_STRIDE + column / 4;
      scores[SUM_PLANE * SCORE_PLANE + index][column % 4] += gradient[i];
    }
  }
}

float sum_at(uint row, uint column) {
  return scores[SUM_PLANE * SCORE_PLANE + row * SCORE_STRIDE + column / 4][column % 4];
}

// Of the keys or coarse rows of the block at work.
void add_block(Place place) {
  uint row = gl_LocalInvocationID.x, position = place.first_position + row;
  bool owns_row = row < TILE_ROWS && position < call.queries;
  if (!block_is_seen(owns_row)) return;
  uint kv_head = place.head / (PARAMS.query_heads / PARAMS.kv_heads);
  float products[THREAD_SCORES], value_products[THREAD_SCORES];
  clear(products);
  clear(value_products);
  View keys = view_of(block_is_coarse ? OPERAND_COARSE_K : OPERAND_K, kv_head, LOG2_BYTES);
  multiply_query_key(products, view_of(OPERAND_Q, place.head, LOG2_BYTES), keys,
                     place.first_position, 0, false);
  if (has(FEATURE_DOUT)) {
    View values = view_of(block_is_coarse ? OPERAND_COARSE_V : OPERAND_V, kv_head, LOG2_BYTES);
    multiply_query_key(value_products, view_of(OPERAND_DOUT, place.head, LOG2_BYTES), values,
                       place.first_position, 0, false);
  }
  put_products(products, 0);
  put_products(value_products, 1);
  barrier();
  if (owns_row) {
    QueryState state = load_query_state(view_of(OPERAND_LSE, place.head, 2),
                                        view_of(OPERAND_DELTA, place.head, 2), position, 0);
    add_row(row, position, place, state);
  }
  barrier();
}

void add_term(Place place) {
  set_scores(place.head);
  uint position = place.first_position + gl_LocalInvocationID.x;
  if (has(FEATURE_PLAN)) {
    bool exists = position < call.queries;
    row_levels = levels_of(place.head / plan_tile_heads(),
                           min(position, call.queries - 1) / PARAMS.plan_positions);
    row_level_bias = load_levels_pair(OPERAND_LEVEL_BIAS, exists && has(FEATURE_LEVEL_BIAS),
                                      place.head, position, 0);
    row_level_cotangents =
        load_levels_pair(OPERAND_DSHARES, exists && has(FEATURE_DSHARES), place.head, position, 0);
  }
  if (place.first_coarse_row == NO_ROW) {
    block_is_coarse = false;
    set_contiguous_block(place.first_key);
    uvec2 positions =
        uvec2(place.first_position, min(place.first_position + TILE_ROWS, call.queries));
    uvec2 keys = uvec2(place.first_key, min(place.first_key + BLOCK_ROWS, call.keys));
    if (classify_positions(positions, keys) != TILE_HIDDEN) add_block(place);
  }
  if (has(FEATURE_PLAN) && (place.first_coarse_row != NO_ROW || !sums_keys())) {
    set_coarse_block(place);
    add_block(place);
  }
}

// Sums over the rows and columns of the tile itself, where the gradient has no such axis, and
// writes what is left.
void store_sums(Place place) {
  View view = view_of(OPERAND_DBIAS, place.head, BIAS_LOG2_BYTES);
  uint self = gl_LocalInvocationID.x;
  uint rows = min(TILE_ROWS, call.queries - place.first_position);
  uint columns = min(BLOCK_ROWS, call.keys - place.first_key);
  if (view.row_stride == 0) {
    for (uint column = self; column < BLOCK_ROWS; column += THREADS) {
      float sum = 0.0;
      for (uint row = 0; row < TILE_ROWS; ++row) sum += sum_at(row, column);
      scores[SUM_PLANE * SCORE_PLANE + column / 4][column % 4] = sum;
    }
    rows = 1;
    barrier();
  }
  if (view.column_stride == 0) {
    if (self < rows) {
      float sum = 0.0;
      for (uint column = 0; column < BLOCK_ROWS; ++column) sum += sum_at(self, column);
      scores[SUM_PLANE * SCORE_PLANE + self * SCORE_STRIDE].x = sum;
    }
    columns = 1;
    barrier();
  }
  for (uint i = self; i < rows * columns; i += THREADS) {
    uint row = i / columns, column = i % columns;
    uint index = row_start(view, place.first_position + row, 0) +
                 (place.first_key + column) * view.column_stride;
    store_element(view.base, index, sum_at(row, column), BIAS_DTYPE);
  }
}

void main() {
  load_call();
  uint owned = workgroup_index(), term = 0;
  Place place = locate(owned, term);
  if (owned != 0) return;
  start_staging();
  for (uint i = gl_LocalInvocationID.x; i < SCORE_PLANE; i += THREADS) {
    scores[SUM_PLANE * SCORE_PLANE + i] = vec4(0);
  }
  for (uint number = 0;; ++number) {
    owned = workgroup_index();
    term = number;
    place = locate(owned, term);
    if (term != 0) break;
    add_term(place);
  }
  barrier();
  owned = workgroup_index();
  term = 0;
  store_sums(locate(owned, term));
}
