// What a workgroup finds out together, always in the same order of sums: the same bits every time.
// Every thread calls these functions.
#include "common/scan.glsl"

const uint REDUCED_AT_ONCE = 4;

shared float reduced[REDUCED_AT_ONCE * THREADS];
shared uint histogram[256];
shared uvec2 chosen_bin;  // its bits, and how many lie above it

float combined(float a, float b, bool largest) { return largest ? max(a, b) : a + b; }

// The sum or the largest of `value` over the workgroup, for `columns` values at once: thread t holds
// those of all columns in reduced[column * THREADS + t]; they end in reduced[column].
void reduce_columns(uint columns, bool largest) {
  uint lanes = THREADS / columns;
  uint column = gl_LocalInvocationID.x / lanes, lane = gl_LocalInvocationID.x % lanes;
  barrier();
  float value = reduced[column * THREADS + lane];
  for (uint i = 1; i < columns; ++i) {
    value = combined(value, reduced[column * THREADS + lane + i * lanes], largest);
  }
  barrier();
  reduced[lane * columns + column] = value;
  barrier();
  for (uint rest = lanes / 2; rest > 0; rest /= 2) {
    if (lane < rest) {
      reduced[lane * columns + column] =
          combined(reduced[lane * columns + column],
                   reduced[(lane + rest) * columns + column], largest);
    }
    barrier();
  }
}

float reduce(float value, bool largest) {
  barrier();
  reduced[gl_LocalInvocationID.x] = value;
  reduce_columns(1, largest);
  return reduced[0];
}

// Of the histogram, which the threads have filled: the bin of the n-th entry from above, and how many
// lie in bins above it.
uvec2 find_bin(uint n) {
  const uint bins = 256 / THREADS;
  uint first = gl_LocalInvocationID.x * bins, own = 0;
  barrier();
  if (gl_LocalInvocationID.x == 0) chosen_bin = uvec2(0);
  for (uint i = 0; i < bins; ++i) own += histogram[first + i];
  uint up_to = scan(own);
  uint above = counts[THREADS - 1] - up_to;
  if (above < n && n <= above + own) {
    uint bin = first + bins - 1;
    while (above + histogram[bin] < n) above += histogram[bin--];
    chosen_bin = uvec2(bin, above);
  }
  barrier();
  return chosen_bin;
}
