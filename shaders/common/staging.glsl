// Global memory to the slices in shared memory. Rows that do not exist and columns past head_dim
// become zeros. The caller puts barriers around.
#include "common/elementary.glsl"
#include "common/levels.glsl"
#include "common/products.glsl"

#define ABSENT_ROW 0xffffffffu
#define NO_ROW 0x7fffffffu  // past every key and position

// First rows of the granules of the block at work, copied from the work list.
uint block_granules[BLOCK_GRANULES];

// A block of coarse rows instead: which, and the logarithm of how many keys each stands for.
bool block_is_coarse = false;
const uint COARSE_BLOCK_ROWS = (FEATURES & FEATURE_PLAN) != 0 ? BLOCK_ROWS : 1;
shared uint block_coarse_rows[COARSE_BLOCK_ROWS];
shared float block_log_counts[COARSE_BLOCK_ROWS];

void load_block(WorkList list, uint block) {
  uint first_entry = list.first_entry + block * BLOCK_GRANULES;
  [[unroll]] for (uint i = 0; i < BLOCK_GRANULES; ++i) {
    block_granules[i] = load_word(list.entries, first_entry + i);
  }
}

uint coarse_blocks(WorkList list) {
  return has(FEATURE_PLAN) ? divide_up(list.coarse_rows, BLOCK_ROWS) : 0;
}

void load_coarse_block(WorkList list, uint block) {
  block_is_coarse = true;
  barrier();
  for (uint i = gl_LocalInvocationID.x; i < BLOCK_ROWS; i += THREADS) {
    uint number = block * BLOCK_ROWS + i;
    uint entry = load_word(list.entries, list.first_coarse_entry + number);
    uint row = bitfieldExtract(entry, 0, COARSE_ROW_BITS);
    bool exists = number < list.coarse_rows && row < PARAMS.coarse_rows;
    block_coarse_rows[i] = exists ? row : NO_ROW;
    block_log_counts[i] = log_accurate(float((entry >> COARSE_ROW_BITS) + 1));
  }
  barrier();
}

void set_contiguous_block(uint first_row) {
  [[unroll]] for (uint i = 0; i < BLOCK_GRANULES; ++i) {
    block_granules[i] = first_row + i * GRANULE_ROWS;
  }
}

// Granules of queries, one after the other.
void set_query_block(uint first_position) {
  [[unroll]] for (uint i = 0; i < BLOCK_GRANULES; ++i) {
    block_granules[i] = first_position + i * GRANULE_POSITIONS;
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
  uint keys = has(FEATURE_COARSE_TILE) ? PARAMS.coarse_rows : call.keys;
  return key < keys ? row_start(view, key, 0) : ABSENT_ROW;
}

// Of row `row` of the block at work.
uint block_row_start(View view, uint row) {
  if (!block_is_coarse) return key_row_start(view, block_key(row));
  uint coarse_row = block_coarse_rows[row];
  return coarse_row == NO_ROW ? ABSENT_ROW : row_start(view, coarse_row, 0);
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
    uint start = block_row_start(view, row);
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
