// Prefix sums over a workgroup.
#include "common/specialization.glsl"

shared uint counts[THREADS];

// Inclusive prefix sum of `value` over the workgroup; the total stays in the last of `counts` until
// the next scan.
uint scan(uint value) {
  uint self = gl_LocalInvocationID.x;
  barrier();
  counts[self] = value;
  barrier();
  for (uint distance = 1; distance < THREADS; distance *= 2) {
    uint before = self >= distance ? counts[self - distance] : 0;
    barrier();
    counts[self] += before;
    barrier();
  }
  return counts[self];
}
