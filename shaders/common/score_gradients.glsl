// The score gradients dS = P (dout . v - delta), stored by the kernel of dk and dv for that of dq: five
// products instead of seven. Of a key/value head they lie as matrices of 16 keys x 16 query rows,
// [chunk of query heads][tile of queries][granule of keys][granule of the tile]; of a matrix the
// elements of each lane together, as a lane of the accumulator holds them. Of granules of queries and
// tiles of keys that do not see each other nothing is stored.
#include "common/coopmat_rows.glsl"

const uint GRADIENT_TILE_ROWS = 128;  // of queries; kernels' tiles may have half of them
const uint GRADIENT_TILE_GRANULES = GRADIENT_TILE_ROWS / GRANULE_ROWS;
const uint MATRIX_VECTORS = 32;

uint gradient_tiles(uint rows) { return divide_up(rows, GRADIENT_TILE_ROWS); }

// Those of the batch entry at work. There is room for some heads, which take turns.
uvec2 gradients_of(uint kv_head) {
  uint head = batch_entry * PARAMS.kv_heads + kv_head;
  View view = view_of(OPERAND_SCORE_GRADIENTS, head % PARAMS.score_gradient_heads, 1);
  return subgroupBroadcastFirst(view.base);
}

// Vectors of a tile of queries.
uint gradient_tile_vectors() {
  uint granules = gradient_tiles(PARAMS.keys) * GRADIENT_TILE_GRANULES;
  return subgroupBroadcastFirst(granules * GRADIENT_TILE_GRANULES * MATRIX_VECTORS);
}

// Vectors from the start of a tile of queries to the matrices of a granule of keys.
uint granule_vectors(uint key_granule) {
  return key_granule * GRADIENT_TILE_GRANULES * MATRIX_VECTORS;
}

// Two neighbouring elements. bfloat16 is truncated, as drivers do: one instruction.
uint packed_gradients(vec2 pair) {
  if (DTYPE == DTYPE_F16) return packHalf2x16(pair);
  return (floatBitsToUint(pair.y) & 0xffff0000u) | (floatBitsToUint(pair.x) >> 16);
}
