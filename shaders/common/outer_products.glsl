// Sums of outer products of rows, left by right: a workgroup takes a square of them, OUTER_QUADS quads
// of columns a side; its threads are groups of 64, each of which takes every so many rows.
#define OUTER_QUADS 8
#define OUTER_ROWS 32  // in shared memory at once
#define OUTER_VECTORS (OUTER_ROWS * OUTER_QUADS)

const uint SQUARES = (QUADS + OUTER_QUADS - 1) / OUTER_QUADS;  // along a side of the whole
const uint OUTER_GROUPS = THREADS / 64;

shared vec4 left_rows[OUTER_VECTORS], right_rows[OUTER_VECTORS];

// Defined by the kernel: a quad of a row that exists.
vec4 left_quad(uint row, uint quad);
vec4 right_quad(uint row, uint quad);

// Of so many rows. The threads of the first group are given the sums: those of the four columns of the
// left quad `left` + thread / 8 with the right quad `right` + thread % 8.
void sum_outer_products(uint rows, uint left, uint right, out vec4 sums[4]) {
  uint self = gl_LocalInvocationID.x, group = self / 64;
  uint left_place = self % 64 / OUTER_QUADS, right_place = self % OUTER_QUADS;
  [[unroll]] for (uint i = 0; i < 4; ++i) sums[i] = vec4(0);
  for (uint first = 0; first < rows; first += OUTER_ROWS) {
    barrier();
    for (uint i = self; i < OUTER_VECTORS; i += THREADS) {
      uint row = first + i / OUTER_QUADS, quad = i % OUTER_QUADS;
      left_rows[i] = vec4(0);
      right_rows[i] = vec4(0);
      if (row < rows && left + quad < QUADS) left_rows[i] = left_quad(row, left + quad);
      if (row < rows && right + quad < QUADS) right_rows[i] = right_quad(row, right + quad);
    }
    barrier();
    for (uint row = group; row < OUTER_ROWS; row += OUTER_GROUPS) {
      vec4 factor = left_rows[row * OUTER_QUADS + left_place];
      vec4 other = right_rows[row * OUTER_QUADS + right_place];
      [[unroll]] for (uint i = 0; i < 4; ++i) sums[i] = fma(vec4(factor[i]), other, sums[i]);
    }
  }
  for (uint other = 1; other < OUTER_GROUPS; ++other) {
    barrier();
    if (group == other) {
      [[unroll]] for (uint i = 0; i < 4; ++i) left_rows[i * 64 + self % 64] = sums[i];
    }
    barrier();
    if (group == 0) {
      [[unroll]] for (uint i = 0; i < 4; ++i) sums[i] += left_rows[i * 64 + self];
    }
  }
}
