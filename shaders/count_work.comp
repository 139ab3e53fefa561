#version 460
// Counts what the kernels of a planned call multiply, for a profile. A workgroup serves one list and
// writes of it: pairs of a row of queries and an exact row, pairs with coarse rows, both in two
// words, the low one first, and the most rows that a tile reads.
#include "common/plan_tile.glsl"

const uint WORDS = 6;  // of a list; the last one stays 0

shared uvec2 exact_pairs[THREADS];
shared uvec2 coarse_pairs[THREADS];
shared uint most_rows[THREADS];

void main() {
  uint list = workgroup_index() % list_count(), entry = workgroup_index() / list_count();
  if (entry >= PARAMS.batch_count) return;
  set_batch(entry);
  uint self = gl_LocalInvocationID.x;
  exact_pairs[self] = coarse_pairs[self] = uvec2(0);
  most_rows[self] = 0;
  for (uint tile = self; tile < PARAMS.plan_tiles; tile += THREADS) {
    uvec4 header = bounded_header(list_header(OPERAND_LIST_HEADERS, list, tile));
    uint positions = min(PARAMS.plan_positions, PARAMS.queries - tile * PARAMS.plan_positions);
    uint rows = positions * TILE_HEADS, exact_rows = header.z * GRANULE_ROWS;
    exact_pairs[self] = add_wide(exact_pairs[self], multiply_wide(rows, exact_rows));
    coarse_pairs[self] = add_wide(coarse_pairs[self], multiply_wide(rows, header.w));
    most_rows[self] = max(most_rows[self], exact_rows + header.w);
  }
  barrier();
  if (self != 0) return;
  for (uint other = 1; other < THREADS; ++other) {
    exact_pairs[0] = add_wide(exact_pairs[0], exact_pairs[other]);
    coarse_pairs[0] = add_wide(coarse_pairs[0], coarse_pairs[other]);
    most_rows[0] = max(most_rows[0], most_rows[other]);
  }
  Words target = Words(view_of(OPERAND_WORK_COUNTS, 0, 2).base);
  uint first = (entry * list_count() + list) * WORDS;
  target.word[first] = exact_pairs[0].x;
  target.word[first + 1] = exact_pairs[0].y;
  target.word[first + 2] = coarse_pairs[0].x;
  target.word[first + 3] = coarse_pairs[0].y;
  target.word[first + 4] = most_rows[0];
  target.word[first + 5] = 0;
}
