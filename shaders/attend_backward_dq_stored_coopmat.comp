#version 460
// Gradient of a tile of queries from stored score gradients, on cooperative matrices: dq = scale dS K
// over the keys of its work list. It waits for memory, not for products: with one stage, whose blocks
// may be twice as large, twice as much is on its way.
#define STAGED_OPERANDS 1
#define STAGES 1
#include "common/coopmat_query_tile.glsl"
#include "common/score_gradients.glsl"

// A row of the stage holds dS of one key and all query rows of the tile.
const uint GRADIENT_PITCH = TILE_ROWS / 8 + 1;
shared uvec4 staged_gradients[BLOCK_ROWS * GRADIENT_PITCH];

// A subgroup fetches a matrix at once.
const uint TILE_GRANULES = TILE_ROWS / GRANULE_ROWS;
const uint GRADIENT_FETCHES = BLOCK_GRANULES * TILE_GRANULES / SUBGROUPS;

QueryTile tile;
uvec2 gradients;
uint first_vector;  // of the tile, that this lane holds
Accumulator dq[ROW_TILES][DIM_TILES];

// Of the block on its way; bit 2 n + h of `hidden_gradients`: of fetch n nothing is stored for the
// row h that this lane holds.
uvec4 next_gradients[GRADIENT_FETCHES];
uint hidden_gradients;

// Which granules of the block and of the tile fetch n is about.
uint key_granule(uint n) { return n * SUBGROUPS / TILE_GRANULES; }
uint query_granule(uint n) { return n * SUBGROUPS % TILE_GRANULES + gl_SubgroupID; }

// Whether a granule of queries and the tile of keys around a granule see each other: as
// work_lists.comp tells when it lists the one for the other.
bool is_stored(uint query_granule, uint granule) {
  uint position = tile.first_position + query_granule * GRANULE_POSITIONS;
  uint key = granule / TILE_ROWS * TILE_ROWS;  // tiles of keys have as many rows
  uvec2 positions = uvec2(position, min(position + GRANULE_POSITIONS, PARAMS.queries));
  uvec2 keys = uvec2(key, min(key + TILE_ROWS, PARAMS.keys));
  return granule != NO_GRANULE && classify_positions(positions, keys) != TILE_HIDDEN;
}

void fetch_gradients(Walk walk, uint block) {
  hidden_gradients = 0;
  [[unroll]] for (uint n = 0; n < GRADIENT_FETCHES; ++n) {
    // As named for the rows of keys.
    uint granule = next_granules[key_granule(n) * (GRANULE_ROWS / FETCH_ROWS)];
    uint at = first_vector + granule_vectors(min(granule, walk.last_key) / GRANULE_ROWS) +
              query_granule(n) * MATRIX_VECTORS;
    next_gradients[n] = RowVectors(gradients).vector[at];
    if (block < walk.full_blocks) continue;
    bool stored = is_stored(query_granule(n), granule);
    [[unroll]] for (uint h = 0; h < LANE_ROWS; ++h) {
      if (!stored || granule + lane_row(h) >= key_limit) hidden_gradients |= 1 << (2 * n + h);
    }
  }
}

void stage_gradients() {
  [[unroll]] for (uint n = 0; n < GRADIENT_FETCHES; ++n) {
    [[unroll]] for (uint h = 0; h < LANE_ROWS; ++h) {
      uint row = key_granule(n) * GRANULE_ROWS + lane_row(h);
      uint at = row * GRADIENT_PITCH + 2 * query_granule(n);
      bool hidden = (hidden_gradients >> (2 * n + h) & 1) != 0;
      [[unroll]] for (uint half_row = 0; half_row < 2; ++half_row) {
        uint pair = next_gradients[n][2 * h + half_row];
        staged_gradients[at + half_row][gl_SubgroupInvocationID % 4] = hidden ? 0 : pair;
      }
    }
  }
}

void fetch_step(Walk walk, uint block) {
  fetch_block(walk, 0);
  fetch_gradients(walk, min(block, walk.blocks - 1));
}

void stage_step() {
  stage_rows(0, 0);
  stage_gradients();
  barrier();
}

void add_block(Walk walk, uint block) {
  fetch_step(walk, block + 1);
  name_block(walk, block + 2);
  [[unroll]] for (uint g = 0; g < BLOCK_GRANULES; ++g) {
    Left ds[ROW_TILES];
    [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
      uint at = g * GRANULE_ROWS * GRADIENT_PITCH + subgroup_row(t) / 8;
      coopMatLoad(ds[t], staged_gradients, at, GRADIENT_PITCH, COLUMN_MAJOR);
    }
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) {
      Right k;
      coopMatLoad(k, staged, g * GRANULE_ROWS * PITCH + 2 * d, PITCH, ROW_MAJOR);
      [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) dq[t][d] = coopMatMulAdd(ds[t], k, dq[t][d]);
    }
  }
  barrier();
  stage_step();
}

void main() {
  if (!locate_uniform_tile(workgroup_index(), tile)) return;
  set_visibility(tile.first_head);
  gradients = gradients_of(tile.kv_head);
  uint chunk = tile.first_head % (PARAMS.query_heads / PARAMS.kv_heads) / TILE_HEADS;
  uint row = tile.first_position * TILE_HEADS;
  uint number =
      chunk * gradient_tiles(PARAMS.queries * TILE_HEADS) + row / GRADIENT_TILE_ROWS;
  first_vector = number * gradient_tile_vectors() +
                 row % GRADIENT_TILE_ROWS / GRANULE_ROWS * MATRIX_VECTORS +
                 gl_SubgroupInvocationID;
  [[unroll]] for (uint t = 0; t < ROW_TILES; ++t) {
    [[unroll]] for (uint d = 0; d < DIM_TILES; ++d) dq[t][d] = Accumulator(0.0);
  }

  Walk walk = listed_walk(tile);
  walk.full_blocks = tile.list.full_blocks;
  if (walk.blocks > 0) {
    name_block(walk, 0);
    fetch_step(walk, 0);
    name_block(walk, 1);
    stage_step();
  }
  for (uint block = 0; block < walk.blocks; ++block) add_block(walk, block);
  store_sums(view_of(OPERAND_DQ, tile.first_head, 1), tile, dq, slope_factor() * TRUNCATION_GAIN);
}
