// Loads and stores of operands as float32. DTYPE is the element type of q, k, v and out.
#include "common/problem.glsl"

layout(buffer_reference, std430, buffer_reference_align = 4) buffer Words { uint word[]; };
layout(buffer_reference, std430, buffer_reference_align = 8) buffer Pairs { uvec2 pair[]; };
layout(buffer_reference, std430, buffer_reference_align = 16) buffer Quads { uvec4 quad[]; };

#define LOG2_BYTES (DTYPE == DTYPE_F32 ? 2 : 1)
#define BIAS_LOG2_BYTES (BIAS_DTYPE == DTYPE_F32 ? 2 : 1)

// Round to nearest, ties to even, NaN kept: packHalf2x16 may truncate.
uint to_half_bits(float x) {
  uint bits = floatBitsToUint(x);
  uint sign = (bits >> 16) & 0x8000u;
  uint magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the value in units of 2^-24 in the low bits, rounded.
    return sign | (floatBitsToUint(uintBitsToFloat(magnitude) + 0.5) - 0x3f000000u);
  }
  return sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
}

uint to_bfloat_bits(float x) {
  uint bits = floatBitsToUint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40u;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

uint to_16_bits(float x, uint dtype) {
  return dtype == DTYPE_F16 ? to_half_bits(x) : to_bfloat_bits(x);
}

float from_16_bits(uint bits, uint dtype) {
  return dtype == DTYPE_F16 ? unpackHalf2x16(bits).x : uintBitsToFloat(bits << 16);
}

// The 16-bit element `index`, through the 32-bit word that holds it.
uint load_16_bits(uvec2 base, uint index) {
  index += (base.x >> 1) & 1u;
  uint word = Words(uvec2(base.x & ~3u, base.y)).word[index >> 1];
  return (index & 1u) != 0 ? word >> 16 : word & 0xffffu;
}

// The byte `index`, likewise.
uint load_byte(uvec2 base, uint index) {
  index += base.x & 3u;
  return (Words(uvec2(base.x & ~3u, base.y)).word[index >> 2] >> (8 * (index & 3u))) & 0xffu;
}

uint load_word(uvec2 base, uint index) { return Words(base).word[index]; }

float load_float(uvec2 base, uint index) { return uintBitsToFloat(load_word(base, index)); }

float load_element(uvec2 base, uint index, uint dtype) {
  return dtype == DTYPE_F32 ? load_float(base, index) : from_16_bits(load_16_bits(base, index), dtype);
}

// Columns `column` to `column + 3` of the row that starts at element `start`; those past HEAD_DIM
// are zero.
vec4 load_columns(uvec2 base, uint start, uint column) {
  vec4 value = vec4(0);
  if (VECTOR_ACCESS != 0) {
    uint quad = (start + column) >> 2;
    if (DTYPE == DTYPE_F32) {
      value = uintBitsToFloat(Quads(base).quad[quad]);
    } else {
      uvec2 pair = Pairs(base).pair[quad];
      value = vec4(from_16_bits(pair.x & 0xffffu, DTYPE), from_16_bits(pair.x >> 16, DTYPE),
                   from_16_bits(pair.y & 0xffffu, DTYPE), from_16_bits(pair.y >> 16, DTYPE));
    }
  } else {
    [[unroll]] for (uint i = 0; i < 4; ++i) {
      if (column + i < HEAD_DIM) value[i] = load_element(base, start + column + i, DTYPE);
    }
  }
  return value;
}
