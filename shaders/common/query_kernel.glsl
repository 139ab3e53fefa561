// What kernels that own a tile of queries and walk blocks of keys share.
#include "common/scores.glsl"
#include "common/staging.glsl"

// products += rows of the tile x rows of the block, over all of head_dim. A tile that is one slice
// wide and already in shared memory is not loaded again.
void multiply_query_key(inout float products[THREAD_SCORES], View tile_view, View block_view,
                        uint first_position, uint first_entry, bool tile_is_loaded) {
  for (uint slice = 0; slice < SLICES; ++slice) {
    barrier();
    if (SLICES > 1 || !tile_is_loaded) stage_query_tile(tile_view, first_position, slice);
    stage_key_block(block_view, first_entry, slice);
    barrier();
    multiply_rows(products, slice);
  }
}

// Key of column `column` of a block; past the last key where there is none.
uint block_key(uint first_entry, uint column) {
  uint granule = list_entry(OPERAND_LISTS, first_entry + column / GRANULE_ROWS);
  return granule == NO_GRANULE ? 0x7fffffffu : granule + column % GRANULE_ROWS;
}

// Writes a quad of a row of the tile, if both exist.
void store_query_quad(View view, uint first_position, uint row, uint column, vec4 value) {
  uint start = query_row_start(view, first_position, row);
  if (start != ABSENT_ROW) store_columns(view.base, start, column, value);
}
