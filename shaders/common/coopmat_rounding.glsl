// Rounding of float32 to the elements of cooperative matrices.
//
// A driver may truncate when it converts to bfloat16 (NVIDIA's does). Rounding each weight by hand
// cost 5% of the forward kernel; what truncation takes away on average is given back to the sums
// instead.
#include "common/coopmat_types.glsl"
#include "common/storage.glsl"

// Whether conversion truncates, found on the device: the number is loaded, so that no compiler
// converts it in advance. It lies at three quarters between two bfloat16 numbers.
bool conversion_truncates() {
  float number = uintBitsToFloat(0x3f80c000u | (PARAMS.head_dim >> 31));
  return float(Element(number)) < number;
}

// Truncated numbers are smaller than exact ones by half a unit in the last place on average, 2^-8
// of a fraction that is 1 / ln 2 on average.
const float TRUNCATION_GAIN = DTYPE == DTYPE_BF16 ? 1.0 + 0.6931472 / 256.0 : 1.0;

// Of what the device converts.
float truncation_gain() { return conversion_truncates() ? TRUNCATION_GAIN : 1.0; }

// The nearest number that a 16-bit element holds exactly; for results, of which there are few.
float rounded(float x) {
  return DTYPE == DTYPE_BF16 ? uintBitsToFloat(to_bfloat_bits(x) << 16) : x;
}
