// Prefix sums over a workgroup.
#include "common/problem.glsl"

const uint SCAN_RUN = 16;  // values that a thread adds up by itself

shared uint counts[THREADS];
shared uint run_counts[THREADS / SCAN_RUN];

// Inclusive prefix sum of `value` over the workgroup; the total stays in the last of `counts` until
// the next scan.
uint scan(uint value) {
  uint self = gl_LocalInvocationID.x;
  uint run = self / SCAN_RUN;
  barrier();
  counts[self] = value;
  barrier();
  uint sum = 0;
  [[unroll]] for (uint i = 0; i < SCAN_RUN; ++i) {
    if (i <= self % SCAN_RUN) sum += counts[run * SCAN_RUN + i];
  }
  if (self % SCAN_RUN == SCAN_RUN - 1) run_counts[run] = sum;
  barrier();
  for (uint i = 0; i < run; ++i) sum += run_counts[i];
  counts[self] = sum;
  barrier();
  return sum;
}
