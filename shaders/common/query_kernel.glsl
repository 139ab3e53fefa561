// What kernels that own a tile of queries and walk blocks of keys share.
#include "common/query_tile.glsl"
#include "common/scores.glsl"
#include "common/staging.glsl"

void clear(out float products[THREAD_SCORES]) {
  [[unroll]] for (uint i = 0; i < THREAD_SCORES; ++i) products[i] = 0.0;
}

// products += rows of the tile x rows of the block, over all of head_dim. A tile that is one slice
// wide and already in shared memory is not loaded again.
void multiply_query_key(inout float products[THREAD_SCORES], View tile_view, View block_view,
                        uint first_position, uint block, bool tile_is_loaded) {
  for (uint slice = 0; slice < SLICES; ++slice) {
    barrier();
    if (SLICES > 1 || !tile_is_loaded) stage_query_tile(tile_view, first_position, slice);
    stage_key_block(block_view, block, slice);
    barrier();
    multiply_rows(products, slice);
  }
}

// sums += the score tile of `plane` x rows of the block.
void multiply_key_block(inout vec4 sums[ACCUMULATORS], View view, uint block, uint plane,
                        bool guard) {
  [[unroll]] for (uint slice = 0; slice < SLICES; ++slice) {
    barrier();
    stage_key_block(view, block, slice);
    barrier();
    multiply_scores(sums, plane, slice, guard);
  }
}

void store_query_sums(View view, uint first_position, vec4 sums[ACCUMULATORS]) {
  [[unroll]] for (uint i = 0; i < THREAD_ROWS; ++i) {
    uint start = query_row_start(view, first_position, thread_row(i));
    if (start == ABSENT_ROW) continue;
    [[unroll]] for (uint slice = 0; slice < SLICES; ++slice) {
      [[unroll]] for (uint q = 0; q < THREAD_QUADS; ++q) {
        store_columns(view.base, start, sum_column(slice, q), sums[sum_index(slice, q, i)]);
      }
    }
  }
}
