#version 460
// Makes the work lists of exact attention: for each tile every granule that some row of it may
// see, in ascending order, those that all rows see first. A workgroup makes one list.
#include "common/visibility.glsl"
#include "common/work_list.glsl"

shared uint counts[THREADS];

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

// Chooses the batch entry and the heads that stand for all that share the list; false past the
// last one.
bool set_list(uint list) {
  uint heads_a_list = TRANSPOSED != 0 ? PARAMS.query_heads / PARAMS.kv_heads : TILE_HEADS;
  uint head_stride = TRANSPOSED != 0 ? PARAMS.key_list_head_stride : PARAMS.list_head_stride;
  uint batch_lists = 1;
  [[unroll]] for (int axis = 0; axis < MAX_BATCH_AXES; ++axis) {
    uint stride = PARAMS.list_batch_stride[axis];
    batch_index[axis] = 0;
    if (stride != 0) {
      batch_lists *= PARAMS.batch[axis];
      batch_index[axis] = list / stride % PARAMS.batch[axis];
    }
  }
  uint head_list = list / batch_lists;
  if (head_list >= (head_stride != 0 ? PARAMS.query_heads / heads_a_list : 1)) return false;
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

// Inclusive prefix sum of `value` over the workgroup.
uint scan(uint value) {
  uint self = gl_LocalInvocationID.x;
  barrier();
  counts[self] = value;
  barrier();
  for (uint distance = 1; distance < THREADS; distance *= 2) {
    uint before = self >= distance ? counts[self - distance] : 0;
    barrier();
    counts[self] += before;
    barrier();
  }
  return counts[self];
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

  uint slot = TRANSPOSED != 0 ? OPERAND_KEY_LISTS : OPERAND_LISTS;
  uint capacity = TRANSPOSED != 0 ? PARAMS.key_list_capacity : PARAMS.list_capacity;
  uvec2 address = list_address(slot);
  uint first_entry = PARAMS.operand[slot].row_stride + workgroup_index() * capacity;
  uint blocks = divide_up(total, BLOCK_GRANULES);
  if (gl_LocalInvocationID.x == 0) {
    uint full_blocks = full / BLOCK_GRANULES;
    Quads(address).quad[workgroup_index()] =
        uvec4(first_entry, full_blocks, blocks - full_blocks, 0);
  }
  for (uint i = total + gl_LocalInvocationID.x; i < blocks * BLOCK_GRANULES; i += THREADS) {
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
