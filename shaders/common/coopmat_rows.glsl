// Rows of head_dim on their way between global memory, registers and padded shared memory, in
// vectors of 16 bytes.
//
// The operands of a block, two or for tangents four, lie in one of two stages. While one stage is worked on, the next
// block is on its way in registers, so that one barrier a step is enough. The kernels live at the
// limit of 255 registers a thread: what a loop keeps in a register and could do without costs a
// spill.
#include "common/coopmat_layout.glsl"
#include "common/levels.glsl"

const uint SUBGROUPS = THREADS / 32;
const uint ROW_TILES = TILE_ROWS / (16 * SUBGROUPS);  // 16-row tiles that a subgroup owns
const uint DIM_TILES = (HEAD_DIM + 15) / 16;
// Vectors of a row: as fetched (a power of two, so that a granule takes whole steps of the
// workgroup), and from one staged row to the next (odd, so that eight rows meet all 32 banks).
const uint VECTORS = HEAD_DIM <= 64 ? 8 : (HEAD_DIM <= 128 ? 16 : 32);
const uint PITCH = 2 * DIM_TILES + 1;
const uint FETCH_ROWS = THREADS / VECTORS;          // rows that the workgroup fetches at once
const uint FETCHES = BLOCK_ROWS / FETCH_ROWS;

// Operands of a block that are staged here, and stages.
#ifndef STAGES
#define STAGED_OPERANDS 2
#define STAGES 2
#endif
const uint OPERAND_VECTORS = BLOCK_ROWS * PITCH;
const uint STAGE_VECTORS = STAGED_OPERANDS * OPERAND_VECTORS;

// Also holds 16 rows of each subgroup, before and after the walk of the work list, and in the forward
// kernel as many rows as there are columns: for its rows of up to 128 blocks of 32 have the room.
const uint EXCHANGE_VECTORS = SUBGROUPS * 16 * PITCH;
const uint STAGED_VECTORS = STAGES * STAGE_VECTORS;
shared uvec4 staged[STAGED_VECTORS > EXCHANGE_VECTORS ? STAGED_VECTORS : EXCHANGE_VECTORS];

uint stage_start(uint stage) { return stage % STAGES * STAGE_VECTORS; }

// Read-only and not aliased: the compiler may move these loads over barriers.
layout(buffer_reference, std430, buffer_reference_align = 16) readonly restrict buffer RowVectors {
  uvec4 vector[];
};
layout(buffer_reference, std430, buffer_reference_align = 4) readonly restrict buffer Entries {
  uint entry[];
};

bool holds_data(uint column) { return HEAD_DIM == VECTORS * 8 || column * 8 < HEAD_DIM; }
bool is_staged(uint column) { return VECTORS < PITCH || column < PITCH; }

uvec4 load_vector(View view, uint start, uint column) {
  return holds_data(column) ? RowVectors(view.base).vector[start / 8 + column] : uvec4(0);
}

// One operand of the work list's rows, strides in vectors.
struct Source {
  uvec2 base;
  uint row_stride;
  uint head_stride;
};

WorkList uniform_list(WorkList list) {
  return WorkList(subgroupBroadcastFirst(list.entries), subgroupBroadcastFirst(list.first_entry),
                  subgroupBroadcastFirst(list.full_blocks), subgroupBroadcastFirst(list.blocks),
                  subgroupBroadcastFirst(list.first_coarse_entry),
                  subgroupBroadcastFirst(list.coarse_rows));
}

uint fetch_row() { return gl_LocalInvocationIndex / VECTORS; }
uint fetch_column() { return gl_LocalInvocationIndex % VECTORS; }

// What all lanes share is said to be shared, so that it is kept in uniform registers: it saves a
// kernel that is short of registers from spilling.
Source source_of(View view) {
  return Source(subgroupBroadcastFirst(view.base), subgroupBroadcastFirst(view.row_stride / 8),
                subgroupBroadcastFirst(view.head_stride / 8));
}

uvec4 fetch(Source source, uint row_start) {
  return holds_data(fetch_column()) ? RowVectors(source.base).vector[row_start + fetch_column()]
                                    : uvec4(0);
}

// The block on its way: its granules, or coarse rows, are named one step before they are fetched.
uint next_granules[FETCHES];
uvec4 next_rows[2][FETCHES];  // of two operands

// Where fetch n of this thread lies in the block: row in its granule, and the granule.
uint fetch_granule_row(uint n) { return (n * FETCH_ROWS + fetch_row()) % GRANULE_ROWS; }
uint fetch_granule(uint n) {
  uint first = n * FETCH_ROWS / GRANULE_ROWS;
  return FETCH_ROWS <= GRANULE_ROWS ? first : first + fetch_row() / GRANULE_ROWS;
}

void name_granules(Entries entries, uint first_entry) {
  [[unroll]] for (uint n = 0; n < FETCHES; ++n) {
    next_granules[n] = entries.entry[first_entry + fetch_granule(n)];
  }
}

void name_coarse_rows(Entries entries, uint first_entry) {
  [[unroll]] for (uint n = 0; n < FETCHES; ++n) {
    uint entry = entries.entry[first_entry + n * FETCH_ROWS + fetch_row()];
    next_granules[n] = bitfieldExtract(entry, 0, COARSE_ROW_BITS);
  }
}

void fetch_coarse_rows(uint operand, Source source, uint last_row) {
  [[unroll]] for (uint n = 0; n < FETCHES; ++n) {
    next_rows[operand][n] = fetch(source, min(next_granules[n], last_row) * source.row_stride);
  }
}

// Rows after the last visible one are replaced by others (NO_GRANULE wraps round to the first
// ones): what they add with weight zero must be finite.
void fetch_keys(uint operand, Source source, uint last_key) {
  [[unroll]] for (uint n = 0; n < FETCHES; ++n) {
    uint key = min(next_granules[n] + fetch_granule_row(n), last_key);
    next_rows[operand][n] = fetch(source, key * source.row_stride);
  }
}

void fetch_queries(uint operand, Source source, uint first_head, uint last_position) {
  [[unroll]] for (uint n = 0; n < FETCHES; ++n) {
    uint row = fetch_granule_row(n), head = first_head + row % TILE_HEADS;
    uint position = min(next_granules[n] + row / TILE_HEADS, last_position);
    uint start = position * source.row_stride + head * source.head_stride;
    next_rows[operand][n] = fetch(source, start);
  }
}

// Those held on their way as `held`, as an operand of the stage.
void stage_held(uint stage, uint held, uint operand) {
  uint start = stage_start(stage) + operand * OPERAND_VECTORS;
  [[unroll]] for (uint n = 0; n < FETCHES; ++n) {
    uint at = start + (n * FETCH_ROWS + fetch_row()) * PITCH + fetch_column();
    if (is_staged(fetch_column())) staged[at] = next_rows[held][n];
  }
}

void stage_rows(uint stage, uint operand) { stage_held(stage, operand, operand); }

// Keeps the compiler from starting the matrix products after it before those in front of it are
// done. Left free it overlaps so many that it spills; with this the kernel for dk and dv of
// head_dim 128 went from 150 to 290 TFLOP/s.
void limit_overlap() { subgroupMemoryBarrierShared(); }

// Each subgroup passes its own rows, 16 at a time, through a part of `staged`: the rows of its tile
// before the first block is staged, its results after the last. The caller puts barriers around.
const uint EXCHANGES = 16 * VECTORS / 32;

uint exchange_start() { return gl_SubgroupID * 16 * PITCH; }
uint exchange_row(uint n) { return (n * 32 + gl_SubgroupInvocationID) / VECTORS; }
uint exchange_column() { return gl_SubgroupInvocationID % VECTORS; }
uint exchange_at(uint n) { return exchange_start() + exchange_row(n) * PITCH + exchange_column(); }

// Stores a matrix whose elements lie as is known, rounded, from vector `at` of `staged` on.
void store_matrix(Accumulator x, uint at) {
  if (!RELAYS) {
    coopMatStore(Rounded(x), staged, at, PITCH, ROW_MAJOR);
    return;
  }
  [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; i += 2) {
    uint column = element_column(i);
    staged[at + element_row(i) * PITCH + column / 8][column % 8 / 2] =
        to_16_bits(x[i], DTYPE) | to_16_bits(x[i + 1], DTYPE) << 16;
  }
}

// First row of 16-row tile t of this subgroup, in the workgroup's tile.
uint subgroup_row(uint t) { return (gl_SubgroupID * ROW_TILES + t) * 16; }
