#version 460
// Adds up the gradients of coarse rows that parts of lists have given, into those of the first part.
#include "common/key_parts.glsl"
#include "common/store.glsl"

const uint QUADS = (HEAD_DIM + 3) / 4;

void add_parts(uint slot, uint head, uint row, uint quad) {
  if (list_parts(row) == 1) return;
  View sums = view_of(slot, head, LOG2_BYTES);
  uint start = row_start(sums, row, 0);
  vec4 total = vec4(0);
  for (uint part = 0; part < list_parts(row); ++part) {
    total += load_columns(part_view(sums, row, part).base, start, quad * 4);
  }
  store_columns(sums.base, start, quad * 4, total);
}

void main() {
  uint workgroups = divide_up(PARAMS.coarse_rows * QUADS, THREADS);  // of a head
  uint head = workgroup_index() / workgroups;
  uint index = workgroup_index() % workgroups * THREADS + gl_LocalInvocationID.x;
  if (head >= PARAMS.kv_heads * PARAMS.batch_count || index >= PARAMS.coarse_rows * QUADS) return;
  set_batch(head / PARAMS.kv_heads);
  head %= PARAMS.kv_heads;
  if (has(FEATURE_DCOARSE_K)) add_parts(OPERAND_DCOARSE_K, head, index / QUADS, index % QUADS);
  if (has(FEATURE_DCOARSE_V)) add_parts(OPERAND_DCOARSE_V, head, index / QUADS, index % QUADS);
}
