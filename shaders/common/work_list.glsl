// Work lists: which blocks of rows a tile sees. The buffer starts with a header a tile, (first
// entry, full blocks, mixed blocks, 0); an entry is the first key of a granule, or in a transposed
// list its first query position. Entries are indices of words in the buffer.
#include "common/storage.glsl"

#define GRANULE_ROWS 16
#define NO_GRANULE 0xffffffffu

const uint GRANULE_POSITIONS = GRANULE_ROWS / TILE_HEADS;  // of a granule of queries
const uint BLOCK_GRANULES = BLOCK_ROWS / GRANULE_ROWS;

uvec2 list_address(uint slot) {
  return uvec2(PARAMS.operand[slot].address_low, PARAMS.operand[slot].address_high);
}

// The list shared by the batch entry at work and others like it.
uint batch_list() {
  uint list = 0;
  [[unroll]] for (uint axis = 0; axis < MAX_BATCH_AXES; ++axis) {
    list += batch_index[axis] * PARAMS.list_batch_stride[axis];
  }
  return list;
}

uint list_entry(uint slot, uint index) { return load_word(list_address(slot), index); }

uvec4 list_header(uint slot, uint list_tile) { return Quads(list_address(slot)).quad[list_tile]; }
