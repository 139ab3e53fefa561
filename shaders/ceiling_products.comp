#version 460
// Multiplies and adds in registers, to measure how fast the portable kernels could be. A thread makes
// STEPS * CHAINS * 4 products; the result is stored, lest a compiler leave them out.
#extension GL_EXT_buffer_reference : require
#extension GL_EXT_buffer_reference_uvec2 : require
#extension GL_EXT_control_flow_attributes : require

layout(local_size_x_id = 0) in;
layout(constant_id = 0) const uint THREADS = 64;

// As in csrc/metrics/ceilings.cc. Chains hide the latency of an operation.
const uint STEPS = 1024;
const uint CHAINS = 8;

layout(buffer_reference, std430, buffer_reference_align = 16) writeonly buffer Target {
  vec4 sum[];
};

layout(push_constant) uniform Push { uvec2 target; };

void main() {
  uint self = gl_LocalInvocationID.x;
  vec4 sums[CHAINS];
  [[unroll]] for (uint i = 0; i < CHAINS; ++i) sums[i] = vec4(self + i);
  // Not a constant, and small enough that no sum leaves the normal numbers.
  vec4 factor = vec4(0.25 + 1e-6 * float(self)), term = vec4(0.5, 0.25, 0.125, 1);
  for (uint step = 0; step < STEPS; ++step) {
    [[unroll]] for (uint i = 0; i < CHAINS; ++i) sums[i] = fma(sums[i], factor, term);
  }
  [[unroll]] for (uint i = 1; i < CHAINS; ++i) sums[0] += sums[i];
  Target(target).sum[self] = sums[0];
}
