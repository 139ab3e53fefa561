// Global memory to the slices in shared memory. Rows that do not exist and columns past head_dim
// become zeros. The caller puts barriers around.
//
// A block of keys or queries is named by the first of its entries on the work list or, where the
// includer defines CONTIGUOUS_BLOCKS, by its first key.
#include "common/elementary.glsl"
#include "common/products.glsl"
#include "common/work_list.glsl"

#define ABSENT_ROW 0xffffffffu
#define NO_KEY 0x7fffffffu  // past every key

// Before the first barrier of a kernel.
void start_staging() {
  if (gl_LocalInvocationID.x == 0) not_finite_staging = 0;
}

// Element where the row of a query operand starts, or ABSENT_ROW. Rows go over the heads of a tile
// first, then over positions.
uint query_row_start(View view, uint first_position, uint row) {
  uint position = first_position + row / TILE_HEADS;
  return position < PARAMS.queries ? row_start(view, position, row % TILE_HEADS) : ABSENT_ROW;
}

uint key_row_start(View view, uint key) {
  return key < PARAMS.keys ? row_start(view, key, 0) : ABSENT_ROW;
}

uint block_key(uint block, uint row) {
#ifdef CONTIGUOUS_BLOCKS
  return block + row;
#else
  uint granule = list_entry(OPERAND_LISTS, block + row / GRANULE_ROWS);
  return granule == NO_GRANULE ? NO_KEY : granule + row % GRANULE_ROWS;
#endif
}

vec4 load_slice_quad(View view, uint start, uint column) {
  return start == ABSENT_ROW || column >= HEAD_DIM ? vec4(0)
                                                   : load_columns(view.base, start, column);
}

void put_block_quad(uint row, uint quad, vec4 value) {
  block_slice[row * SLICE_STRIDE + quad] = value;
  if (!(is_finite(value.x) && is_finite(value.y) && is_finite(value.z) && is_finite(value.w))) {
    not_finite_staging = staging;
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
    uint start = key_row_start(view, first_key + row);
    tile_slice[row * SLICE_STRIDE + quad] =
        load_slice_quad(view, start, slice * SLICE_COLUMNS + quad * 4);
  }
}

void stage_key_block(View view, uint block, uint slice) {
  ++staging;
  for (uint i = gl_LocalInvocationID.x; i < BLOCK_ROWS * SLICE_QUADS; i += THREADS) {
    uint row = i / SLICE_QUADS, quad = i % SLICE_QUADS;
    uint start = key_row_start(view, block_key(block, row));
    put_block_quad(row, quad, load_slice_quad(view, start, slice * SLICE_COLUMNS + quad * 4));
  }
}

// The block of queries that the entries of a transposed list name.
void stage_query_block(View view, uint block, uint slice) {
  ++staging;
  for (uint i = gl_LocalInvocationID.x; i < BLOCK_ROWS * SLICE_QUADS; i += THREADS) {
    uint row = i / SLICE_QUADS, quad = i % SLICE_QUADS;
    uint granule = list_entry(OPERAND_KEY_LISTS, block + row / GRANULE_ROWS);
    uint start = granule == NO_GRANULE ? ABSENT_ROW
                                       : query_row_start(view, granule, row % GRANULE_ROWS);
    put_block_quad(row, quad, load_slice_quad(view, start, slice * SLICE_COLUMNS + quad * 4));
  }
}
