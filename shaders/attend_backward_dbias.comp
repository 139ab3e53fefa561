#version 460
// Gradient of bias: dbias = dS, summed over the axes along which the gradient has no stride. A
// workgroup owns TILE_ROWS x BLOCK_ROWS of the gradient and walks all that is summed in a fixed
// order, so that the sums are the same every time. TILE_HEADS is 1 here.
#define SCORE_PLANES 3
#define TILE_PLANES 1
#define STORE_16_BITS
#include "common/query_kernel.glsl"
#include "common/score_gradient.glsl"

#define SUM_PLANE 2

struct Place {
  uint head;
  uint first_position;
  uint first_key;
};

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
  bool summed = PARAMS.operand[OPERAND_DBIAS].column_stride == 0;
  place.first_key = coordinate(summed, blocks, owned, term) * BLOCK_ROWS;
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

// Adds dS of a row to its sums.
void add_row(uint row, uint position, uint first_key, QueryState state) {
  for (uint quad = 0; quad < SCORE_QUADS; ++quad) {
    uint index = row * SCORE_STRIDE + quad;
    vec4 product = scores[index], value_product = scores[SCORE_PLANE + index], gradient;
    [[unroll]] for (uint i = 0; i < 4; ++i) {
      Score score = score_of(product[i], position, 0, first_key + quad * 4 + i, true);
      float weight = probability(score.value, state.logsumexp);
      gradient[i] = score_gradient(weight, value_product[i], state.delta);
    }
    scores[SUM_PLANE * SCORE_PLANE + index] += gradient;
  }
}

float sum_at(uint row, uint column) {
  return scores[SUM_PLANE * SCORE_PLANE + row * SCORE_STRIDE + column / 4][column % 4];
}

void add_term(Place place) {
  set_scores(place.head);
  uint kv_head = place.head / (PARAMS.query_heads / PARAMS.kv_heads);
  uvec2 positions =
      uvec2(place.first_position, min(place.first_position + TILE_ROWS, call.queries));
  uvec2 keys = uvec2(place.first_key, min(place.first_key + BLOCK_ROWS, call.keys));
  if (classify_positions(positions, keys) == TILE_HIDDEN) return;
  set_contiguous_block(place.first_key);
  float products[THREAD_SCORES], value_products[THREAD_SCORES];
  clear(products);
  clear(value_products);
  multiply_query_key(products, view_of(OPERAND_Q, place.head, LOG2_BYTES),
                     view_of(OPERAND_K, kv_head, LOG2_BYTES), place.first_position, 0, false);
  if (has(FEATURE_DOUT)) {
    multiply_query_key(value_products, view_of(OPERAND_DOUT, place.head, LOG2_BYTES),
                       view_of(OPERAND_V, kv_head, LOG2_BYTES), place.first_position, 0, false);
  }
  put_products(products, 0);
  put_products(value_products, 1);
  barrier();
  uint row = gl_LocalInvocationID.x, position = place.first_position + row;
  if (row < TILE_ROWS && position < call.queries) {
    QueryState state = load_query_state(view_of(OPERAND_LSE, place.head, 2),
                                        view_of(OPERAND_DELTA, place.head, 2), position, 0);
    add_row(row, position, place.first_key, state);
  }
  barrier();
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
