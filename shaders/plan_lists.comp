#version 460
// Entries of the work lists of a plan, by its levels: of each query tile first the granules at level
// 0, full ones before mixed ones, then its coarse rows. A workgroup makes the list of one tile.
#include "common/scan.glsl"
#include "common/plan_tile.glsl"

uvec2 entries;

// What is past the room of the list, which holds whatever levels there may be, is left out.
void write_entry(uint index, uint entry) {
  if (index < PARAMS.list_capacity) Words(entries).word[index] = entry;
}

void fill(uint first, uint end) {
  for (uint i = first + gl_LocalInvocationID.x; i < end; i += THREADS) write_entry(i, NO_GRANULE);
}

uint coarse_entry(uint row, uint keys) { return row | (keys - 1) << COARSE_ROW_BITS; }

void main() {
  uint self = gl_LocalInvocationID.x;
  uint list, tile;
  if (!set_plan_tile(list, tile)) return;
  entries = view_of(OPERAND_LIST_ENTRIES, list, 2).base;
  uvec4 header = list_header(OPERAND_LIST_HEADERS, list, tile);
  View levels = levels_of(list, tile);
  uint granules = granule_count(), super_tiles = PARAMS.coarse_rows - granules;

  uint next_full = header.x, next_mixed = header.x + header.y;
  uint next_row = header.x + round_up(header.z, LIST_STEP);
  for (uint base = 0; base < granules; base += THREADS) {
    uint granule = base + self;
    uint level = granule < granules ? granule_level(levels, granule) : 3;
    bool full = level == LEVEL_EXACT && boundary_of(tile, granule).full;
    bool mixed = level == LEVEL_EXACT && !full, coarse = level == LEVEL_MEAN;
    // Three ranks in one sum of ten bits each.
    uint ranks = scan((full ? 1u : 0u) | (mixed ? 1u << 10 : 0u) | (coarse ? 1u << 20 : 0u));
    uint total = counts[THREADS - 1];
    if (full) write_entry(next_full + (ranks & 0x3ffu) - 1, granule * GRANULE_ROWS);
    if (mixed) write_entry(next_mixed + (ranks >> 10 & 0x3ffu) - 1, granule * GRANULE_ROWS);
    if (coarse) {
      write_entry(next_row + (ranks >> 20) - 1, coarse_entry(granule, granule_keys(granule)));
    }
    next_full += total & 0x3ffu;
    next_mixed += total >> 10 & 0x3ffu;
    next_row += total >> 20;
  }
  for (uint base = 0; base < super_tiles; base += THREADS) {
    uint super_tile = base + self;
    uint keys = super_tile < super_tiles ? super_mean_keys(levels, super_tile) : 0;
    uint rank = scan(keys > 0 ? 1u : 0u);
    if (keys > 0) write_entry(next_row + rank - 1, coarse_entry(granules + super_tile, keys));
    next_row += counts[THREADS - 1];
  }
  fill(next_mixed, header.x + round_up(header.z, LIST_STEP));
  fill(next_row, header.x + list_room(header.z, header.w));

  // The tiles share what is behind the last of them.
  uvec4 last = list_header(OPERAND_LIST_HEADERS, list, PARAMS.plan_tiles - 1);
  uint end = last.x + list_room(last.z, last.w);
  if (end >= PARAMS.list_capacity) return;
  uint share = divide_up(PARAMS.list_capacity - end, PARAMS.plan_tiles);
  fill(end + tile * share, min(end + (tile + 1) * share, PARAMS.list_capacity));
}
