#version 460
// Writes which element of a 16x16 matrix each lane holds where, so that the runtime can tell
// whether the layout is the one the *_coopmat kernels assume (common/coopmat_types.glsl): for lane
// l and element i, word 8 * l + i is row * 16 + column in an accumulator, word 256 + 8 * l + i in
// a left factor; words past a lane's elements are left alone. One workgroup of 32 threads.
#extension GL_EXT_buffer_reference : require
#extension GL_EXT_buffer_reference_uvec2 : require
#include "common/coopmat_types.glsl"

layout(local_size_x = 32) in;

layout(buffer_reference, std430, buffer_reference_align = 4) writeonly buffer Words {
  uint word[];
};

layout(push_constant) uniform Push { uvec2 address; };

shared float numbers[256];
shared uint packed[128];

void main() {
  uint lane = gl_SubgroupInvocationID;
  for (uint i = lane; i < 256; i += 32) numbers[i] = float(i);
  // Pairs of 16-bit numbers: all below 256, so exact in both types.
  for (uint i = lane; i < 128; i += 32) {
#if DTYPE == DTYPE_BF16
    packed[i] = (floatBitsToUint(float(2 * i)) >> 16) |
                (floatBitsToUint(float(2 * i + 1)) & 0xffff0000u);
#else
    packed[i] = packHalf2x16(vec2(2 * i, 2 * i + 1));
#endif
  }
  barrier();
  Accumulator accumulator;
  Left left;
  coopMatLoad(accumulator, numbers, 0, 16, ROW_MAJOR);
  coopMatLoad(left, packed, 0, 8, ROW_MAJOR);
  [[unroll]] for (uint i = 0; i < 8; ++i) {
    if (i < accumulator.length()) Words(address).word[8 * lane + i] = uint(accumulator[i]);
  }
  [[unroll]] for (uint i = 0; i < 8; ++i) {
    if (i < left.length()) Words(address).word[256 + 8 * lane + i] = uint(float(left[i]));
  }
}
