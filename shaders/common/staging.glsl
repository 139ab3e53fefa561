// Global memory to the slices in shared memory. Rows that do not exist and columns past head_dim
// become zeros. The caller puts barriers around.
#include "common/elementary.glsl"
#include "common/products.glsl"
#include "common/work_list.glsl"

#define ABSENT_ROW 0xffffffffu
#define NO_ROW 0x7fffffffu  // past every key and position

// First rows of the granules of the block at work, copied from the work list.
uint block_granules[BLOCK_GRANULES];

void load_block(uint slot, uint first_entry) {
  [[unroll]] for (uint i = 0; i < BLOCK_GRANULES; ++i) {
    block_granules[i] = list_entry(slot, first_entry + i);
  }
}

void set_contiguous_block(uint first_row) {
  [[unroll]] for (uint i = 0; i < BLOCK_GRANULES; ++i) {
    block_granules[i] = first_row + i * GRANULE_ROWS;
  }
}

// First row of the granule that row `row` of the block belongs to.
uint block_granule(uint row) {
  uint first = block_granules[0];
  [[unroll]] for (uint i = 1; i < BLOCK_GRANULES; ++i) {
    if (row >= i * GRANULE_ROWS) first = block_granules[i];
  }
  return first;
}

uint block_key(uint row) {
  uint granule = block_granule(row);
  return granule == NO_GRANULE ? NO_ROW : granule + row % GRANULE_ROWS;
}

uint block_position(uint row) {
  uint granule = block_granule(row);
  return granule == NO_GRANULE ? NO_ROW : granule + row % GRANULE_ROWS / TILE_HEADS;
}

// Before the first barrier of a kernel.
void start_staging() {
  if (gl_LocalInvocationID.x == 0) not_finite_staging = 0;
}

// Element where the row of a query operand starts, or ABSENT_ROW. Heads count from the view's.
uint query_row_start(View view, uint position, uint head) {
  return position < call.queries ? row_start(view, position, head) : ABSENT_ROW;
}

uint key_row_start(View view, uint key) {
  return key < call.keys ? row_start(view, key, 0) : ABSENT_ROW;
}

// Of a row of the tile that starts at a position; rows go over the heads of a tile first.
uint tile_row_start(View view, uint first_position, uint row) {
  return query_row_start(view, first_position + row / TILE_HEADS, row % TILE_HEADS);
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

void stage_query_tile(View view, uint first_position, uint slice, uint plane) {
  for (uint i = gl_LocalInvocationID.x; i < TILE_ROWS * SLICE_QUADS; i += THREADS) {
    uint row = i / SLICE_QUADS, quad = i % SLICE_QUADS;
    uint start = tile_row_start(view, first_position, row);
    tile_slice[plane * TILE_PLANE + row * SLICE_STRIDE + quad] =
        load_slice_quad(view, start, slice * SLICE_COLUMNS + quad * 4);
  }
}

void stage_key_tile(View view, uint first_key, uint slice, uint plane) {
  for (uint i = gl_LocalInvocationID.x; i < TILE_ROWS * SLICE_QUADS; i += THREADS) {
    uint row = i / SLICE_QUADS, quad = i % SLICE_QUADS;
    uint start = key_row_start(view, first_key + row);
    tile_slice[plane * TILE_PLANE + row * SLICE_STRIDE + quad] =
        load_slice_quad(view, start, slice * SLICE_COLUMNS + quad * 4);
  }
}

void stage_key_block(View view, uint slice) {
  ++staging;
  for (uint i = gl_LocalInvocationID.x; i < BLOCK_ROWS * SLICE_QUADS; i += THREADS) {
    uint row = i / SLICE_QUADS, quad = i % SLICE_QUADS;
    uint start = key_row_start(view, block_key(row));
    put_block_quad(row, quad, load_slice_quad(view, start, slice * SLICE_COLUMNS + quad * 4));
  }
}

void stage_query_block(View view, uint slice) {
  ++staging;
  for (uint i = gl_LocalInvocationID.x; i < BLOCK_ROWS * SLICE_QUADS; i += THREADS) {
    uint row = i / SLICE_QUADS, quad = i % SLICE_QUADS;
    uint start = query_row_start(view, block_position(row), row % TILE_HEADS);
    put_block_quad(row, quad, load_slice_quad(view, start, slice * SLICE_COLUMNS + quad * 4));
  }
}
