#version 460
// Makes the work lists of exact attention: for each tile every granule that some row of it may
// see, in ascending order, those that all rows see first. A workgroup makes one list.
#include "common/scan.glsl"
#include "common/visibility.glsl"
#include "common/work_list.glsl"

const uint HEADERS = TRANSPOSED != 0 ? OPERAND_KEY_LIST_HEADERS : OPERAND_LIST_HEADERS;
const uint ENTRIES = TRANSPOSED != 0 ? OPERAND_KEY_LIST_ENTRIES : OPERAND_LIST_ENTRIES;

uint head_list;  // the head chunk, or the key/value head, of the list at work

struct Sizes {
  uint tile_rows;  // positions or keys of a tile
  uint tile_end;   // number of rows along the tiles
  uint granule_rows;
  uint granule_end;
};

Sizes list_sizes() {
  return TRANSPOSED != 0
             ? Sizes(TILE_ROWS, call.keys, GRANULE_POSITIONS, call.queries)
             : Sizes(TILE_ROWS / TILE_HEADS, call.queries, GRANULE_ROWS, call.keys);
}

// Chooses the batch entry and the heads that stand for all that share the list, which are ordered by
// heads first; false past the last one.
bool set_list(uint list) {
  uint heads_a_list = TRANSPOSED != 0 ? PARAMS.query_heads / PARAMS.kv_heads : TILE_HEADS;
  [[unroll]] for (int axis = MAX_BATCH_AXES - 1; axis >= 0; --axis) {
    uint extent = PARAMS.operand[HEADERS].batch_stride[axis] != 0 ? PARAMS.batch[axis] : 1;
    batch_index[axis] = list % extent;
    list /= extent;
  }
  bool heads_differ = PARAMS.operand[HEADERS].head_stride != 0;
  if (list >= (heads_differ ? PARAMS.query_heads / heads_a_list : 1)) return false;
  head_list = list;
  set_visibility(head_list * heads_a_list);
  return true;
}

uint classify_granule(Sizes sizes, uint tile, uint granule) {
  uint tile_start = tile * sizes.tile_rows, start = granule * sizes.granule_rows;
  if (start >= sizes.granule_end) return TILE_HIDDEN;
  uvec2 rows = uvec2(tile_start, min(tile_start + sizes.tile_rows, sizes.tile_end));
  uvec2 listed = uvec2(start, min(start + sizes.granule_rows, sizes.granule_end));
  uint heads = TRANSPOSED != 0 ? PARAMS.query_heads / PARAMS.kv_heads : TILE_HEADS;
  uint result = TRANSPOSED != 0 ? classify(listed, rows, heads) : classify(rows, listed, heads);
  // A granule cut by the end of the sequence has rows to hide.
  bool cut = start + sizes.granule_rows > sizes.granule_end;
  return cut ? min(result, TILE_MIXED) : result;
}

void main() {
  load_call();
  Sizes sizes = list_sizes();
  uint tiles = divide_up(sizes.tile_end, sizes.tile_rows);
  uint granules = divide_up(sizes.granule_end, sizes.granule_rows);
  uint list = workgroup_index() / tiles, tile = workgroup_index() % tiles;
  if (!set_list(list)) return;

  uint own_full = 0, own_mixed = 0;
  for (uint granule = gl_LocalInvocationID.x; granule < granules; granule += THREADS) {
    uint found = classify_granule(sizes, tile, granule);
    own_full += found == TILE_FULL ? 1 : 0;
    own_mixed += found == TILE_MIXED ? 1 : 0;
  }
  scan(own_full);
  uint full = counts[THREADS - 1];
  scan(own_mixed);
  uint total = full + counts[THREADS - 1];

  uint capacity = TRANSPOSED != 0 ? PARAMS.key_list_capacity : PARAMS.list_capacity;
  uvec2 address = view_of(ENTRIES, head_list, 2).base;
  uint first_entry = tile * (capacity / tiles);
  if (gl_LocalInvocationID.x == 0) {
    Quads(view_of(HEADERS, head_list, 2).base).quad[tile] = uvec4(first_entry, full, total, 0);
  }
  for (uint i = total + gl_LocalInvocationID.x; i < round_up(total, LIST_STEP); i += THREADS) {
    Words(address).word[first_entry + i] = NO_GRANULE;
  }
  // Ranks of full granules count in the lower half of a sum, those of mixed ones in the upper.
  uint next_full = first_entry, next_mixed = first_entry + full;
  for (uint base = 0; base < granules; base += THREADS) {
    uint granule = base + gl_LocalInvocationID.x;
    uint found = classify_granule(sizes, tile, granule);
    uint ranks = scan(found == TILE_FULL ? 1u : (found == TILE_MIXED ? 0x10000u : 0u));
    if (found == TILE_FULL) {
      Words(address).word[next_full + (ranks & 0xffffu) - 1] = granule * sizes.granule_rows;
    } else if (found == TILE_MIXED) {
      Words(address).word[next_mixed + (ranks >> 16) - 1] = granule * sizes.granule_rows;
    }
    next_full += counts[THREADS - 1] & 0xffffu;
    next_mixed += counts[THREADS - 1] >> 16;
  }
}
