// Few tiles of coarse rows see very many queries, so several workgroups share the transposed list of
// one: each takes a part and has sums of its own, which sum_parts.comp adds up. Nearly all queries
// see the means of super-tiles: the lists of tiles with such rows have more parts and start before
// the others of the heads beside them. Cut as the others are, and last, the GPU would wait for them.
#include "common/key_list.glsl"
#include "common/parts.glsl"

layout(constant_id = 14) const uint SUPER_LIST_PARTS = 1;  // LIST_PARTS at least

// Coarse rows before the tiles with means of super-tiles, where these have other parts.
uint plain_rows() {
  bool all = SUPER_LIST_PARTS == LIST_PARTS;
  return all ? PARAMS.coarse_rows : granule_count() / PLAN_KEY_ROWS * PLAN_KEY_ROWS;
}

// Of the tiles with and without means of super-tiles.
uvec2 tiles_of_both_kinds() {
  uint tiles = divide_up(tile_row_end(), TILE_ROWS);
  uint plain = SUPER_LIST_PARTS == LIST_PARTS ? tiles : plain_rows() / TILE_ROWS;
  return uvec2(tiles - plain, plain);
}

// Workgroups of a head.
uint shares_of_head() {
  uvec2 tiles = tiles_of_both_kinds();
  return tiles.x * SUPER_LIST_PARTS + tiles.y * LIST_PARTS;
}

// The part of a tile's list that a workgroup takes.
struct Share {
  uint tile;
  uint part;
  uint parts;
};

Share share_of_head(uint number) {
  uvec2 tiles = tiles_of_both_kinds();
  if (number < tiles.x * SUPER_LIST_PARTS) {
    return Share(tiles.y + number / SUPER_LIST_PARTS, number % SUPER_LIST_PARTS, SUPER_LIST_PARTS);
  }
  number -= tiles.x * SUPER_LIST_PARTS;
  return Share(number / LIST_PARTS, number % LIST_PARTS, LIST_PARTS);
}

PlanList part_of(PlanList list, Share share) {
  uint first = list.count * share.part / share.parts;
  uint end = list.count * (share.part + 1) / share.parts;
  return PlanList(list.entries, list.first_entry + first, end - first, list.first_chunk);
}

uint list_parts(uint row) { return row < plain_rows() ? LIST_PARTS : SUPER_LIST_PARTS; }

// Where the sums of a part of the list of a row's tile lie: those of first parts as the rows do, then
// those of the other parts of plain rows, part by part, and of the rows after them.
View part_view(View sums, uint row, uint part) {
  if (part == 0) return sums;
  uint plain = plain_rows(), rows = PARAMS.coarse_rows;
  if (row < plain) {
    rows += (part - 1) * plain;
  } else {
    // May wrap around on the way.
    rows += (LIST_PARTS - 1) * plain + (part - 1) * (PARAMS.coarse_rows - plain) - plain;
  }
  sums.base = add_wide(sums.base, multiply_wide(rows, sums.row_stride << LOG2_BYTES));
  return sums;
}
