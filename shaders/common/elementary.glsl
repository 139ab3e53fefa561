// exp, log and tanh to about one unit in the last place of float32 on every device: the built-in
// ones of some drivers lose four digits, or turn exp(-inf) into a small number.

#define INFINITY uintBitsToFloat(0x7f800000u)
const float LN2_HIGH = 0.693359375;  // exact in 10 bits: its multiples by an exponent are exact
const float LN2_LOW = -2.12194440e-4;

bool is_finite(float x) { return (floatBitsToUint(x) & 0x7f800000u) != 0x7f800000u; }

// exp(-inf) is 0 and so are results below the normal range; NaN stays.
float exp_accurate(float x) {
  float n = floor(clamp(x, -88.0, 89.0) * 1.44269504 + 0.5);
  float r = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, x));
  float y = 1.0 / 5040.0;
  y = fma(y, r, 1.0 / 720.0);
  y = fma(y, r, 1.0 / 120.0);
  y = fma(y, r, 1.0 / 24.0);
  y = fma(y, r, 1.0 / 6.0);
  y = fma(y, r, 0.5);
  y = fma(y, r, 1.0);
  y = fma(y, r, 1.0);
  // In two steps: 2^128 is no float32.
  int half_exponent = int(n) >> 1;
  y *= uintBitsToFloat(uint(127 + half_exponent) << 23);
  y *= uintBitsToFloat(uint(127 + int(n) - half_exponent) << 23);
  return x < -87.3 ? 0.0 : (x > 88.8 ? INFINITY : y);
}

// Of a positive normal number.
float log_accurate(float x) {
  uint bits = floatBitsToUint(x);
  // The fraction in [sqrt(1/2), sqrt(2)).
  uint shifted = bits - 0x3f3504f3u;
  float exponent = float(int(shifted) >> 23);
  float fraction = uintBitsToFloat((shifted & 0x7fffffu) + 0x3f3504f3u);
  // log(f) = 2 atanh(s), s = (f - 1) / (f + 1).
  float s = (fraction - 1.0) / (fraction + 1.0);
  float z = s * s;
  float series = z * fma(z, fma(z, fma(z, 2.0 / 9.0, 2.0 / 7.0), 2.0 / 5.0), 2.0 / 3.0);
  float low = fma(s, series, exponent * LN2_LOW);
  float value = fma(exponent, LN2_HIGH, fma(s, 2.0, low));
  return is_finite(x) ? value : x;
}

float tanh_accurate(float x) {
  float z = x * x;
  if (z < 0.09) {
    float series = fma(z, fma(z, fma(z, 62.0 / 2835.0, -17.0 / 315.0), 2.0 / 15.0), -1.0 / 3.0);
    return fma(x * z, series, x);
  }
  float y = 1.0 - 2.0 / (exp_accurate(2.0 * abs(x)) + 1.0);
  return x < 0.0 ? -y : y;
}
