// What a workgroup finds out together, always in the same order of sums: the same bits every time.
// Every thread calls these functions.
#include "common/scan.glsl"

const uint REDUCED_AT_ONCE = 8;
const uint REDUCED_RUN = 16;  // values that a thread reduces by itself
const uint REDUCED_PARTS = THREADS / REDUCED_RUN;

shared float reduced[REDUCED_AT_ONCE * THREADS];
shared uint histogram[256];
shared uvec2 chosen_bin;  // its bits, and how many lie above it
shared uint counted;

float combined(float a, float b, bool largest) { return largest ? max(a, b) : a + b; }

// The sum or the largest of `value` over the workgroup, for `columns` values at once: thread t holds
// those of all columns in reduced[column * THREADS + t]; they end in reduced[column].
void reduce_columns(uint columns, bool largest) {
  uint self = gl_LocalInvocationID.x;
  float value = 0;
  barrier();
  if (self < columns * REDUCED_PARTS) {
    uint first = self / REDUCED_PARTS * THREADS + self % REDUCED_PARTS;
    value = reduced[first];
    [[unroll]] for (uint i = 1; i < REDUCED_RUN; ++i) {
      value = combined(value, reduced[first + i * REDUCED_PARTS], largest);
    }
  }
  barrier();
  if (self < columns * REDUCED_PARTS) reduced[self] = value;
  barrier();
  if (self < columns) {
    value = reduced[self * REDUCED_PARTS];
    for (uint i = 1; i < REDUCED_PARTS; ++i) {
      value = combined(value, reduced[self * REDUCED_PARTS + i], largest);
    }
  }
  barrier();
  if (self < columns) reduced[self] = value;
  barrier();
}

float reduce(float value, bool largest) {
  barrier();
  reduced[gl_LocalInvocationID.x] = value;
  reduce_columns(1, largest);
  return reduced[0];
}

// The sum of `own` over the workgroup.
uint count_all(uint own) {
  barrier();
  if (gl_LocalInvocationID.x == 0) counted = 0;
  barrier();
  atomicAdd(counted, own);
  barrier();
  return counted;
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
