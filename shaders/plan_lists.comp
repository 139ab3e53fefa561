#version 460
// Entries of the work lists of a plan, by its levels: of each query tile first the granules at level
// 0, full ones before mixed ones, then its coarse rows. A workgroup makes the list of one tile.
#include "common/scan.glsl"
#include "common/joined.glsl"
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
  // A thread takes a word of levels at a time; fields past the last granule are hidden.
  uint words = divide_up(granules, LEVEL_GRANULES);
  for (uint base = 0; base < words; base += THREADS) {
    uint first = (base + self) * LEVEL_GRANULES;
    uint word = base + self < words ? load_word(levels.base, base + self) : 0xffffffffu;
    uint exact = fields_at(word, LEVEL_EXACT), coarse = fields_at(word, LEVEL_MEAN);
    uint full = exact & boundary_of_word(bounds, tile, first).full, mixed = exact & ~full;
    // Two ranks in one sum of sixteen bits each.
    uint ranks = scan(bitCount(full) | bitCount(mixed) << 16), total = counts[THREADS - 1];
    uint at = next_full + (ranks & 0xffffu) - bitCount(full);
    for (; full != 0; full &= full - 1) {
      write_entry(at++, (first + findLSB(full) / 2) * GRANULE_ROWS);
    }
    at = next_mixed + (ranks >> 16) - bitCount(mixed);
    for (; mixed != 0; mixed &= mixed - 1) {
      write_entry(at++, (first + findLSB(mixed) / 2) * GRANULE_ROWS);
    }
    next_full += total & 0xffffu;
    next_mixed += total >> 16;
    at = next_row + scan(bitCount(coarse)) - bitCount(coarse);
    for (; coarse != 0; coarse &= coarse - 1) {
      uint granule = first + findLSB(coarse) / 2;
      write_entry(at++, coarse_entry(granule, granule_keys(granule)));
    }
    next_row += counts[THREADS - 1];
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

  if (JOINED != 0) return;  // nobody reads what is behind
  // The tiles share what is behind the last of them.
  uvec4 last = list_header(OPERAND_LIST_HEADERS, list, PARAMS.plan_tiles - 1);
  uint end = last.x + list_room(last.z, last.w);
  if (end >= PARAMS.list_capacity) return;
  uint share = divide_up(PARAMS.list_capacity - end, PARAMS.plan_tiles);
  fill(end + tile * share, min(end + (tile + 1) * share, PARAMS.list_capacity));
}
