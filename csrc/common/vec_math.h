// exp, expm1 and tanh on vectors. float: polynomials, within 2 ulp where the result is a normal number; double: the C
// library, a lane at a time. sqrt: the processor's, exactly rounded.
#pragma once

#include "common/vec.h"

namespace rlhf::RLHF_ISA {
namespace {

// exp is exactly 0 at kExpLow and below, in float already below -87 (results under 2^-125 are not worth the cost of
// subnormal numbers).
template <class T>
constexpr T kExpLow = -87.5f;
template <>
constexpr double kExpLow<double> = -746;

struct ExpParts {
  Vec<float> fraction;  // exp(r) - 1, |r| <= log(2) / 2
  Vec<float> scale;     // exp(x) = 2 * scale * (fraction + 1)
};

// x in [kExpLow, 89] or NaN. The polynomial is that of Cephes' expf.
RLHF_INLINE ExpParts exp_parts(Vec<float> x) {
  // Adding 1.5 * 2^23 rounds to an integer, which stands in the low bits: with 126 more they are the exponent field of
  // 2^(n-1).
  constexpr float kRound = 12582912.0f + 126.0f;
  const Vec<float> rounded = x * 1.44269504088896341f + kRound;
  const Vec<float> n = rounded - kRound;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {p * (r * r) + r, (Vec<float>)((Bits<float>)rounded << 23)};
}

// x in [kExpLow, 0] or NaN.
RLHF_INLINE Vec<float> exp_in_range(Vec<float> x) {
  const ExpParts e = exp_parts(x);
  const Vec<float> y = e.fraction + 1.0f;
  return (y + y) * e.scale;
}
RLHF_INLINE Vec<double> exp_in_range(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

template <class T>
struct ExpPair {
  Vec<T> exp, expm1;
};

RLHF_INLINE ExpPair<float> exp_pair(Vec<float> x) {
  x = min(broadcast(89.0f), max(broadcast(kExpLow<float>), x));
  const ExpParts e = exp_parts(x);
  const Vec<float> y = e.fraction + 1.0f;
  const Vec<float> doubled = (e.fraction + e.fraction) * e.scale;
  return {(y + y) * e.scale, doubled + (e.scale + (e.scale - 1.0f))};
}
RLHF_INLINE ExpPair<double> exp_pair(Vec<double> x) {
  ExpPair<double> out;
  for (int i = 0; i < kLanes<double>; ++i) {
    out.exp[i] = __builtin_exp(x[i]);
    out.expm1[i] = __builtin_expm1(x[i]);
  }
  return out;
}

// Cephes' tanhf: an odd polynomial near 0, where 1 - 2 / (exp(2x) + 1) would cancel.
RLHF_INLINE Vec<float> tanh(Vec<float> x) {
  const Vec<float> magnitude = abs<float>(x);
  const Vec<float> z = x * x;
  Vec<float> p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Vec<float> large = 1.0f - 2.0f / (exp_pair(magnitude + magnitude).exp + 1.0f);
  const Vec<float> signed_large = x < 0.0f ? -large : large;
  return magnitude < 0.625f ? p * z * x + x : signed_large;
}
RLHF_INLINE Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

// By name: the vector extensions have no square root, and a loop over lanes calls the C library for negative ones.
#if defined(__AVX512F__)
RLHF_INLINE Vec<float> sqrt(Vec<float> x) { return _mm512_maskz_sqrt_ps(0xffff, x); }
#elif defined(__AVX2__)
RLHF_INLINE Vec<float> sqrt(Vec<float> x) { return _mm256_sqrt_ps(x); }
#elif defined(__SSE__)
RLHF_INLINE Vec<float> sqrt(Vec<float> x) { return __builtin_ia32_sqrtps(x); }
#else
RLHF_INLINE Vec<float> sqrt(Vec<float> x) {
  for (int i = 0; i < kLanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
#endif

}  // namespace
}  // namespace rlhf::RLHF_ISA
