// Global memory to the slices in shared memory. Rows that do not exist and columns past head_dim
// become zeros. The caller puts barriers around.
#include "common/elementary.glsl"
#include "common/products.glsl"
#include "common/query_tile.glsl"

// Element where a row of an operand starts, or ABSENT_ROW.
#define ABSENT_ROW 0xffffffffu

uint query_row_start(View view, uint first_position, uint row) {
  uint position = first_position + row / TILE_HEADS;
  return position < PARAMS.queries ? row_start(view, position, row % TILE_HEADS) : ABSENT_ROW;
}

uint key_row_start(View view, uint first_key, uint row) {
  uint key = first_key + row;
  return key < PARAMS.keys ? row_start(view, key, 0) : ABSENT_ROW;
}

vec4 load_slice_quad(View view, uint start, uint column) {
  return start == ABSENT_ROW || column >= HEAD_DIM ? vec4(0) : load_columns(view.base, start, column);
}

void put_block_quad(uint index, vec4 value) {
  block_slice[index / SLICE_QUADS * SLICE_STRIDE + index % SLICE_QUADS] = value;
  if (!(is_finite(value.x) && is_finite(value.y) && is_finite(value.z) && is_finite(value.w))) {
    block_not_finite = 1;
  }
}

void stage_query_tile(View view, uint first_position, uint slice) {
  for (uint i = gl_LocalInvocationID.x; i < TILE_ROWS * SLICE_QUADS; i += THREADS) {
    uint row = i / SLICE_QUADS, quad = i % SLICE_QUADS;
    uint start = query_row_start(view, first_position, row);
    tile_slice[row * SLICE_STRIDE + quad] =
        load_slice_quad(view, start, slice * SLICE_COLUMNS + quad * 4);
  }
}

void stage_key_tile(View view, uint first_key, uint slice) {
  for (uint i = gl_LocalInvocationID.x; i < TILE_ROWS * SLICE_QUADS; i += THREADS) {
    uint row = i / SLICE_QUADS, quad = i % SLICE_QUADS;
    uint start = key_row_start(view, first_key, row);
    tile_slice[row * SLICE_STRIDE + quad] =
        load_slice_quad(view, start, slice * SLICE_COLUMNS + quad * 4);
  }
}

// The block of keys that the entries from `first_entry` on name.
void stage_key_block(View view, uint first_entry, uint slice) {
  for (uint i = gl_LocalInvocationID.x; i < BLOCK_ROWS * SLICE_QUADS; i += THREADS) {
    uint row = i / SLICE_QUADS, quad = i % SLICE_QUADS;
    uint granule = list_entry(OPERAND_LISTS, first_entry + row / GRANULE_ROWS);
    uint start = granule == NO_GRANULE ? ABSENT_ROW
                                       : key_row_start(view, granule, row % GRANULE_ROWS);
    put_block_quad(i, load_slice_quad(view, start, slice * SLICE_COLUMNS + quad * 4));
  }
}

// The block of queries that the entries of a transposed list name.
void stage_query_block(View view, uint first_entry, uint slice) {
  for (uint i = gl_LocalInvocationID.x; i < BLOCK_ROWS * SLICE_QUADS; i += THREADS) {
    uint row = i / SLICE_QUADS, quad = i % SLICE_QUADS;
    uint granule = list_entry(OPERAND_KEY_LISTS, first_entry + row / GRANULE_ROWS);
    uint start = granule == NO_GRANULE ? ABSENT_ROW
                                       : query_row_start(view, granule, row % GRANULE_ROWS);
    put_block_quad(i, load_slice_quad(view, start, slice * SLICE_COLUMNS + quad * 4));
  }
}
