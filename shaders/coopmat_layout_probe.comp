#version 460
// Writes which element of a 16x16 matrix each lane holds where, so that the runtime can tell
// whether the layout is the one the *_coopmat kernels assume (common/coopmat_types.glsl): for lane
// l and element i, word 8 * l + i is row * 16 + column in an accumulator, word 256 + 8 * l + i in
// a left factor; words past a lane's elements are left alone. With FEATURE_RELAYS it does so after
// the ways that elements take in kernels where the layout is another one
// (common/coopmat_layout.glsl), so that the runtime can tell whether these work. One workgroup of 32
// threads.
#extension GL_EXT_buffer_reference : require
#extension GL_EXT_buffer_reference_uvec2 : require
#include "common/coopmat_layout.glsl"

layout(buffer_reference, std430, buffer_reference_align = 4) writeonly buffer Words {
  uint word[];
};

layout(push_constant) uniform Push { uvec2 address; };

// Of vectors, as those of kernels are: four numbers, or eight of 16 bits, in one.
shared vec4 numbers[64];
shared uvec4 packed[32], identity[32];

void main() {
  uint lane = gl_SubgroupInvocationID;
  for (uint i = lane; i < 256; i += 32) numbers[i / 4][i % 4] = float(i);
  // Pairs of 16-bit numbers: all below 256, so exact in both types.
  for (uint i = lane; i < 128; i += 32) {
    packed[i / 4][i % 4] = packed_pair(float(2 * i), float(2 * i + 1));
    uint row = i / 8, column = i % 8 * 2;
    identity[i / 4][i % 4] = packed_pair(float(row == column), float(row == column + 1));
  }
  barrier();
  Accumulator accumulator;
  Left left;
  coopMatLoad(accumulator, numbers, 0, 4, ROW_MAJOR);
  coopMatLoad(left, packed, 0, 2, ROW_MAJOR);
  if (RELAYS) {
    to_known(accumulator);
    [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; ++i) left[i] = Element(accumulator[i]);
    to_own(accumulator);
    to_known(accumulator);
    to_own(left);
    Right factor;
    coopMatLoad(factor, identity, 0, 2, ROW_MAJOR);
    Accumulator product = coopMatMulAdd(left, factor, Accumulator(0.0));
    to_known(product);
    [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; ++i) {
      Words(address).word[8 * lane + i] = uint(accumulator[i]);
      Words(address).word[256 + 8 * lane + i] = uint(product[i]);
    }
    return;
  }
  [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; ++i) {
    if (i < accumulator.length()) Words(address).word[8 * lane + i] = uint(accumulator[i]);
  }
  [[unroll]] for (uint i = 0; i < LANE_ELEMENTS; ++i) {
    if (i < left.length()) Words(address).word[256 + 8 * lane + i] = uint(float(left[i]));
  }
}
