// What kernels that own a tile of queries and walk blocks of keys share.
#include "common/coarse_scores.glsl"
#include "common/query_tile.glsl"

void clear(out float products[THREAD_SCORES]) {
  [[unroll]] for (uint i = 0; i < THREAD_SCORES; ++i) products[i] = 0.0;
}

// products += rows of the tile x rows of the block, over all of head_dim. A tile that is one slice
// wide stays in its plane of shared memory: with `tile_is_loaded` it is not loaded again.
void multiply_query_key(inout float products[THREAD_SCORES], View tile_view, View block_view,
                        uint first_position, uint plane, bool tile_is_loaded) {
  plane = SLICES > 1 ? 0 : plane;
  for (uint slice = 0; slice < SLICES; ++slice) {
    barrier();
    if (SLICES > 1 || !tile_is_loaded) stage_query_tile(tile_view, first_position, slice, plane);
    stage_key_block(block_view, slice);
    barrier();
    multiply_rows(products, slice, plane);
  }
}

void multiply_key_slice(inout vec4 sums[ACCUMULATORS], View view, uint plane, bool guard,
                        bool block_is_loaded, uint slice) {
  barrier();
  if (SLICES > 1 || !block_is_loaded) {
    stage_key_block(view, slice);
    barrier();
  }
  multiply_scores(sums, plane, slice, guard);
}

// sums += the score tile of `plane` x rows of the block, which `block_is_loaded` says is the one
// that was staged last. Slices are written out: compilers that do not unroll a loop around loops
// would put the sums in memory, at twice the time. There are at most four.
void multiply_key_block(inout vec4 sums[ACCUMULATORS], View view, uint plane, bool guard,
                        bool block_is_loaded) {
  multiply_key_slice(sums, view, plane, guard, block_is_loaded, 0);
  if (SLICES > 1) multiply_key_slice(sums, view, plane, guard, false, 1);
  if (SLICES > 2) multiply_key_slice(sums, view, plane, guard, false, 2);
  if (SLICES > 3) multiply_key_slice(sums, view, plane, guard, false, 3);
}

void store_query_sums(View view, uint first_position, vec4 sums[ACCUMULATORS]) {
  [[unroll]] for (uint i = 0; i < THREAD_ROWS; ++i) {
    uint start = tile_row_start(view, first_position, thread_row(i));
    if (start == ABSENT_ROW) continue;
    [[unroll]] for (uint slice = 0; slice < SLICES; ++slice) {
      [[unroll]] for (uint q = 0; q < THREAD_QUADS; ++q) {
        store_columns(view.base, start, sum_column(slice, q), sums[sum_index(slice, q, i)]);
      }
    }
  }
}
