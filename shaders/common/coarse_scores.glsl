// Scores of the coarse rows in a block, for kernels that own a tile of queries.
#include "common/scores.glsl"
#include "common/staging.glsl"

// Two values of a query, one a level; zero where the operand is not given.
vec2 load_levels_pair(uint slot, bool given, uint first_head, uint position, uint head) {
  if (!given) return vec2(0);
  View view = view_of(slot, first_head, 2);
  uint start = row_start(view, position, head);
  return vec2(load_float(view.base, start), load_float(view.base, start + 1));
}

void store_levels_pair(uint slot, uint first_head, uint position, uint head, vec2 value) {
  View view = view_of(slot, first_head, 2);
  uint start = row_start(view, position, head);
  store_float(view.base, start, value.x);
  store_float(view.base, start + 1, value.y);
}

// Of row `column` of the block; -inf where there is none.
Score coarse_score_of(float product, uint position, uint head, uint column, vec2 level_bias) {
  uint row = block_coarse_rows[column];
  if (row == NO_ROW || position >= query_limit) return Score(-INFINITY, 0.0);
  Score score = transformed_score(product, position, head, first_key_of(row));
  score.value += block_log_counts[column] + level_bias[level_index(row)];
  return score;
}
