// Products of a tile of rows with the matrix Cov(v, k) of a state: a thread has a quad of columns, of
// COLUMN_QUADS at once, and THREAD_TILE rows.
#define COLUMN_QUADS 16  // of the product, at once
#define INPUT_QUADS 4    // of the rows, in shared memory at once
#define MATRIX_STRIDE (COLUMN_QUADS + 1)

const uint THREAD_TILE = TILE_ROWS * COLUMN_QUADS / THREADS;

shared vec4 input_rows[TILE_ROWS * INPUT_QUADS];
shared vec4 matrix[INPUT_QUADS * 4 * MATRIX_STRIDE];

// Defined by the kernel: a quad of a row of the tile; zeros if the row does not exist.
vec4 input_quad(uint row, uint quad);

uint thread_column() { return gl_LocalInvocationID.x % COLUMN_QUADS; }
uint thread_row(uint i) { return gl_LocalInvocationID.x / COLUMN_QUADS * THREAD_TILE + i; }

// The matrix from input columns `first_input` on, to the quads of columns from `column` on. From k to v, or
// from v to k.
void stage_matrix(Vectors state, uint index, uint first_input, uint column, bool from_keys) {
  for (uint i = gl_LocalInvocationID.x; i < INPUT_QUADS * 4 * COLUMN_QUADS; i += THREADS) {
    if (from_keys) {
      uint key_column = first_input * 4 + i / COLUMN_QUADS, quad = column + i % COLUMN_QUADS;
      bool exists = key_column < QUADS * 4 && quad < QUADS;
      matrix[i / COLUMN_QUADS * MATRIX_STRIDE + i % COLUMN_QUADS] =
          exists ? state.vector[covariance_place(index, key_column, quad)] : vec4(0);
    } else {
      uint own = i / INPUT_QUADS, place = i % INPUT_QUADS;
      uint key_column = column * 4 + own, quad = first_input + place;
      bool exists = key_column < QUADS * 4 && quad < QUADS;
      vec4 value = exists ? state.vector[covariance_place(index, key_column, quad)] : vec4(0);
      [[unroll]] for (uint j = 0; j < 4; ++j) {
        matrix[(place * 4 + j) * MATRIX_STRIDE + own / 4][own % 4] = value[j];
      }
    }
  }
}

// Of the state `index`, for the quads of columns from `column` on, of which this thread has one.
void multiply_state(Vectors state, uint index, uint column, bool from_keys,
                    out vec4 sums[THREAD_TILE]) {
  [[unroll]] for (uint i = 0; i < THREAD_TILE; ++i) sums[i] = vec4(0);
  for (uint first = 0; first < QUADS; first += INPUT_QUADS) {
    barrier();
    for (uint i = gl_LocalInvocationID.x; i < TILE_ROWS * INPUT_QUADS; i += THREADS) {
      uint quad = first + i % INPUT_QUADS;
      input_rows[i] = quad < QUADS ? input_quad(i / INPUT_QUADS, quad) : vec4(0);
    }
    stage_matrix(state, index, first, column, from_keys);
    barrier();
    for (uint place = 0; place < min(INPUT_QUADS, QUADS - first); ++place) {
      vec4 factors[4];
      [[unroll]] for (uint j = 0; j < 4; ++j) {
        factors[j] = matrix[(place * 4 + j) * MATRIX_STRIDE + thread_column()];
      }
      [[unroll]] for (uint i = 0; i < THREAD_TILE; ++i) {
        vec4 value = input_rows[thread_row(i) * INPUT_QUADS + place];
        [[unroll]] for (uint j = 0; j < 4; ++j) sums[i] = fma(vec4(value[j]), factors[j], sums[i]);
      }
    }
  }
}
