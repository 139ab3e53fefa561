#version 460
// Multiplies 16x16 matrices in registers, to measure how fast the *_coopmat kernels could be. A
// subgroup makes STEPS * CHAINS products; the result is stored, lest a compiler leave them out.
#extension GL_EXT_buffer_reference : require
#extension GL_EXT_buffer_reference_uvec2 : require
#include "common/coopmat_types.glsl"

layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint THREADS = 128;

// As in csrc/metrics/ceilings.cc. Chains hide the latency of an operation.
const uint STEPS = 1024;
const uint CHAINS = 8;

layout(buffer_reference, std430, buffer_reference_align = 4) writeonly buffer Target {
  float sum[];
};

layout(push_constant) uniform Push { uvec2 target; };

void main() {
  uint self = gl_LocalInvocationID.x;
  // Not constants, and so small that no sum leaves the normal numbers. No two elements are alike: a
  // product of which one half equals the other is made but once.
  Left left;
  Right right;
  Accumulator sums[CHAINS];
  [[unroll]] for (uint n = 0; n < LANE_ELEMENTS; ++n) {
    left[n] = Element(1e-4 * float(self + 7 * n));
    right[n] = Element(1e-4 * float(self + 5 * n + 1));
    [[unroll]] for (uint i = 0; i < CHAINS; ++i) sums[i][n] = float(i + 3 * n);
  }
  for (uint step = 0; step < STEPS; ++step) {
    [[unroll]] for (uint i = 0; i < CHAINS; ++i) sums[i] = coopMatMulAdd(left, right, sums[i]);
  }
  [[unroll]] for (uint i = 1; i < CHAINS; ++i) sums[0] += sums[i];
  float sum = 0.0;
  [[unroll]] for (uint n = 0; n < LANE_ELEMENTS; ++n) sum += sums[0][n];
  Target(target).sum[self] = sum;
}
