// Stores of results. Apart from storage.glsl because only kernels that write 16-bit elements one by
// one need the feature storageBuffer16BitAccess.
#include "common/storage.glsl"

#extension GL_EXT_shader_16bit_storage : require

#if DTYPE != DTYPE_F32 || defined(STORE_16_BITS)
layout(buffer_reference, std430, buffer_reference_align = 2) buffer Halves { uint16_t half_word[]; };
#endif

void store_float(uvec2 base, uint index, float value) {
  Words(base).word[index] = floatBitsToUint(value);
}

void store_element(uvec2 base, uint index, float value, uint dtype) {
#if DTYPE != DTYPE_F32 || defined(STORE_16_BITS)
  if (dtype != DTYPE_F32) {
    Halves(base).half_word[index] = uint16_t(to_16_bits(value, dtype));
    return;
  }
#endif
  store_float(base, index, value);
}

// Columns `column` to `column + 3` of the row that starts at element `start`; those past HEAD_DIM
// are left alone.
void store_columns(uvec2 base, uint start, uint column, vec4 value) {
  if (VECTOR_ACCESS != 0) {
    if (column >= HEAD_DIM) return;
    uint quad = (start + column) >> 2;
    if (DTYPE == DTYPE_F32) {
      Quads(base).quad[quad] = floatBitsToUint(value);
    } else {
      Pairs(base).pair[quad] = uvec2(to_16_bits(value.x, DTYPE) | (to_16_bits(value.y, DTYPE) << 16),
                                     to_16_bits(value.z, DTYPE) | (to_16_bits(value.w, DTYPE) << 16));
    }
  } else {
    [[unroll]] for (uint i = 0; i < 4; ++i) {
      if (column + i < HEAD_DIM) store_element(base, start + column + i, value[i], DTYPE);
    }
  }
}
