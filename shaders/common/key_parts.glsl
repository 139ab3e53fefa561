// Few tiles of coarse rows see very many queries, so several workgroups share the transposed list of
// one: each takes a part and has sums of its own, which sum_parts.comp adds up.
#include "common/key_list.glsl"
#include "common/parts.glsl"

PlanList part_of(PlanList list, uint part) {
  uint first = list.count * part / LIST_PARTS, end = list.count * (part + 1) / LIST_PARTS;
  return PlanList(list.entries, list.first_entry + first, end - first, list.first_chunk);
}

// Of all rows: where the sums of a part lie.
View part_view(View sums, uint part) {
  uvec2 offset = multiply_wide(part * PARAMS.coarse_rows, sums.row_stride << LOG2_BYTES);
  sums.base = add_wide(sums.base, offset);
  return sums;
}
