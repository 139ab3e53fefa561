// Matrix products of float32 tiles, by register tiles from shared memory.
//
// The workgroup is a grid of ROW_THREADS x 8 threads. A thread holds THREAD_ROWS rows, ROW_THREADS
// apart, of both the scores (BLOCK_ROWS / 8 columns, 8 apart) and of what is accumulated over
// head_dim (quads of columns, 8 quads apart). Operands pass through shared memory by slices of
// SLICE_COLUMNS columns; a padding quad a row keeps the rows of neighbouring threads in different
// banks.
//
// Where a subgroup is just the 8 threads of a row, each loads the values of one row and the others
// get them by shuffles. On a processor, where each lane of a load is a load of its own (lavapipe),
// this made the forward kernel 1.4 times as fast; wider subgroups broadcast loads by themselves.
//
// The includer defines SCORE_PLANES, the number of score tiles it keeps in shared memory, and
// TILE_PLANES, that of the tiles of operands which stay there when one slice holds all of head_dim.
#include "common/store.glsl"

#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_shuffle : require

const uint COLUMN_THREADS = 8;
const bool SHUFFLES = SUBGROUP_SIZE == COLUMN_THREADS;
const uint ROW_THREADS = TILE_ROWS / THREAD_ROWS;
const uint SLICES = (HEAD_DIM + SLICE_COLUMNS - 1) / SLICE_COLUMNS;
const uint SLICE_QUADS = SLICE_COLUMNS / 4;
const uint SLICE_STRIDE = SLICE_QUADS + 1;
const uint SCORE_QUADS = BLOCK_ROWS / 4;
const uint SCORE_STRIDE = SCORE_QUADS + 1;
const uint SCORE_PLANE = TILE_ROWS * SCORE_STRIDE;
const uint THREAD_COLUMNS = BLOCK_ROWS / COLUMN_THREADS;
const uint THREAD_SCORES = THREAD_ROWS * THREAD_COLUMNS;
const uint THREAD_QUADS = SLICE_QUADS / COLUMN_THREADS;
const uint ACCUMULATORS = SLICES * THREAD_QUADS * THREAD_ROWS;

const uint TILE_PLANE = TILE_ROWS * SLICE_STRIDE;

shared vec4 tile_slice[(SLICES > 1 ? 1 : TILE_PLANES) * TILE_PLANE];
shared vec4 block_slice[BLOCK_ROWS * SLICE_STRIDE];
shared vec4 scores[SCORE_PLANES * SCORE_PLANE];
// Number of the latest staging that met a NaN or an infinity, and of the one at work.
shared uint not_finite_staging;
uint staging = 0;

uint thread_row(uint i) {
  return (SHUFFLES ? gl_SubgroupID : gl_LocalInvocationID.x / COLUMN_THREADS) + i * ROW_THREADS;
}
uint thread_column() {
  return SHUFFLES ? gl_SubgroupInvocationID : gl_LocalInvocationID.x % COLUMN_THREADS;
}

// Where a thread keeps its quad `q` of a slice for its row `i`.
uint sum_index(uint slice, uint q, uint i) { return (slice * THREAD_QUADS + q) * THREAD_ROWS + i; }

// First column of head_dim of that quad.
uint sum_column(uint slice, uint q) {
  return slice * SLICE_COLUMNS + (thread_column() + q * COLUMN_THREADS) * 4;
}

// products += tile_slice of `plane` x transposed block_slice, over the columns of the slice that exist.
void multiply_rows(inout float products[THREAD_SCORES], uint slice, uint plane) {
  uint tile = plane * TILE_PLANE;
  uint quads = min(SLICE_QUADS, (HEAD_DIM + 3) / 4 - slice * SLICE_QUADS);
  for (uint quad = 0; quad < quads; ++quad) {
    vec4 a[THREAD_ROWS];
    vec4 own = vec4(0);
    if (SHUFFLES) {
      own = tile_slice[tile + thread_row(thread_column() % THREAD_ROWS) * SLICE_STRIDE + quad];
    }
    [[unroll]] for (uint i = 0; i < THREAD_ROWS; ++i) {
      a[i] = SHUFFLES ? subgroupShuffle(own, i)
                      : tile_slice[tile + thread_row(i) * SLICE_STRIDE + quad];
    }
    [[unroll]] for (uint j = 0; j < THREAD_COLUMNS; ++j) {
      vec4 b = block_slice[(thread_column() + j * COLUMN_THREADS) * SLICE_STRIDE + quad];
      [[unroll]] for (uint i = 0; i < THREAD_ROWS; ++i) {
        // Four terms by themselves first: the rounding errors of long sums grow more slowly so.
        float sum = a[i].x * b.x;
        sum = fma(a[i].y, b.y, sum);
        sum = fma(a[i].z, b.z, sum);
        products[i * THREAD_COLUMNS + j] += fma(a[i].w, b.w, sum);
      }
    }
  }
}

void put_products(float products[THREAD_SCORES], uint plane) {
  [[unroll]] for (uint i = 0; i < THREAD_ROWS; ++i) {
    [[unroll]] for (uint j = 0; j < THREAD_COLUMNS; ++j) {
      uint column = thread_column() + j * COLUMN_THREADS;
      scores[plane * SCORE_PLANE + thread_row(i) * SCORE_STRIDE + column / 4][column % 4] =
          products[i * THREAD_COLUMNS + j];
    }
  }
}

// sums += the score tile of `plane` x block_slice, the columns of `slice`. With `guard`, a weight of
// zero hides its row of block_slice even where that row is NaN or infinite.
void multiply_scores(inout vec4 sums[ACCUMULATORS], uint plane, uint slice, bool guard) {
  uint weights = plane * SCORE_PLANE;
  if (guard && not_finite_staging == staging) {
    for (uint j = 0; j < BLOCK_ROWS; ++j) {
      [[unroll]] for (uint q = 0; q < THREAD_QUADS; ++q) {
        vec4 value = block_slice[j * SLICE_STRIDE + thread_column() + q * COLUMN_THREADS];
        [[unroll]] for (uint i = 0; i < THREAD_ROWS; ++i) {
          float weight = scores[weights + thread_row(i) * SCORE_STRIDE + j / 4][j % 4];
          uint index = sum_index(slice, q, i);
          if (weight != 0.0) sums[index] = fma(vec4(weight), value, sums[index]);
        }
      }
    }
  } else {
    for (uint quad = 0; quad < SCORE_QUADS; ++quad) {
      vec4 weight[THREAD_ROWS];
      vec4 own = vec4(0);
      if (SHUFFLES) {
        own = scores[weights + thread_row(thread_column() % THREAD_ROWS) * SCORE_STRIDE + quad];
      }
      [[unroll]] for (uint i = 0; i < THREAD_ROWS; ++i) {
        weight[i] = SHUFFLES ? subgroupShuffle(own, i)
                             : scores[weights + thread_row(i) * SCORE_STRIDE + quad];
      }
      [[unroll]] for (uint q = 0; q < THREAD_QUADS; ++q) {
        [[unroll]] for (uint j = 0; j < 4; ++j) {
          vec4 value =
              block_slice[(quad * 4 + j) * SLICE_STRIDE + thread_column() + q * COLUMN_THREADS];
          [[unroll]] for (uint i = 0; i < THREAD_ROWS; ++i) {
            uint index = sum_index(slice, q, i);
            sums[index] = fma(vec4(weight[i][j]), value, sums[index]);
          }
        }
      }
    }
  }
}
