// Elementary functions of vectors.
#pragma once

#include "vec.h"

namespace mfk {
namespace MFK_ISA {

// 1.5 * 2^23 + 127: adding it rounds to an integer n, and leaves the exponent bits of 2^n in the low ones.
constexpr float kExpShift = 12583039.0f;
// x = n ln 2 + r, |r| <= ln(2)/2; exp(r) by a polynomial, 2^n by its exponent bits.
struct ExpParts {
  vec<float> shifted, r;  // n + kExpShift, and r
};
MFK_INLINE ExpParts exp_parts(vec<float> x) {
  const vec<float> shifted = x * 1.44269504f + kExpShift, whole = shifted - kExpShift;
  const vec<float> r = x - whole * 0.693145752f;
  return {shifted, r - whole * 1.42860682e-6f};
}
// exp(r), nearly the best polynomial of that degree.
MFK_INLINE vec<float> exp_polynomial(vec<float> r) {
  vec<float> p = splat(0.00137514f);
  p = p * r + 0.00836892f;
  p = p * r + 0.04166953f;
  p = p * r + 0.16666518f;
  p = p * r + 0.49999989f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
}

// p 2^n, n being shifted - kExpShift, for results that are normal numbers; NaN for NaN.
MFK_INLINE vec<float> times_power(vec<float> p, vec<float> shifted) {
#if defined(__AVX512F__)
  return reinterpret_cast<vec<float>>(_mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(p),
                                                             reinterpret_cast<__m512>(shifted - kExpShift)));
#else
  return p * reinterpret_cast<vec<float>>(reinterpret_cast<mask<float>>(shifted) << 23);
#endif
}
// The same for any n from -126 to 129, where results may be infinite.
MFK_INLINE vec<float> times_any_power(vec<float> p, vec<float> shifted) {
#if defined(__AVX512F__)
  return times_power(p, shifted);
#else
  // In two steps, since 2^128 has no exponent bits.
  const mask<float> n = reinterpret_cast<mask<float>>(shifted) - 0x4b40007f, half = n >> 1;
  const vec<float> y = p * reinterpret_cast<vec<float>>((half + 127) << 23);
  return y * reinterpret_cast<vec<float>>((n - half + 127) << 23);
#endif
}

// exp(x), within 1.2 units in the last place, in double, too; 0 where the result would be denormal, NaN for
// NaN.
MFK_INLINE vec<float> exp(vec<float> x) {
  const vec<float> low = splat(-87.336544f), infinite = splat(89.0f);
  const ExpParts parts = exp_parts(smaller(infinite, larger(low, x)));
  return x < low ? vec<float>{} : times_any_power(exp_polynomial(parts.r), parts.shifted);
}
MFK_INLINE vec<double> exp(vec<double> x) {
  const vec<double> low = splat(-708.3964185322641), high = splat(709.782712893384);
  vec<double> t = x < low ? low : x;
  t = t > high ? high : t;
  const double shift = 6755399441055744.0;  // 1.5 * 2^52
  vec<double> shifted = t * 1.4426950408889634 + shift;
  mask<double> n = reinterpret_cast<mask<double>>(shifted) - 0x4338000000000000;
  vec<double> whole = shifted - shift;
  vec<double> r = t - whole * 0.6931471803691238;
  r = r - whole * 1.9082149292705877e-10;
  vec<double> p = splat(1.0 / 6227020800);
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  mask<double> half = n >> 1;
  vec<double> y = p * reinterpret_cast<vec<double>>((half + 1023) << 52);
  y = y * reinterpret_cast<vec<double>>((n - half + 1023) << 52);
  y = x < low ? vec<double>{} : y;
  return x > high ? splat(__builtin_inf()) : y;
}
// exp(x) for x <= 0, in fewer steps than exp, within 1.2 units in the last place; where the result would be
// denormal, nearly the smallest normal number.
MFK_INLINE vec<float> exp_nonpositive(vec<float> x) {
  const vec<float> low = splat(-87.336544f);
  const ExpParts parts = exp_parts(larger(low, x));
  return times_power(exp_polynomial(parts.r), parts.shifted);
}

// 2^x for x above -126 and below 128, within 1.8 units in the last place: 2^r of the fraction r by a
// least-squares fit; NaN for NaN.
MFK_INLINE vec<float> exp2_normal(vec<float> x) {
#if defined(__AVX512F__)
  const vec<float> r =
      reinterpret_cast<vec<float>>(_mm512_maskz_reduce_ps(0xffff, reinterpret_cast<__m512>(x), 1));
#else
  const vec<float> shifted = (x - 0.5f) + kExpShift, r = x - (shifted - kExpShift);
#endif
  vec<float> p = splat(0.00021702251877789937f);
  p = p * r + 0.001243968887280844f;
  p = p * r + 0.009678840882432987f;
  p = p * r + 0.05548334204104108f;
  p = p * r + 0.24022983626143468f;
  p = p * r + 0.6931469838416214f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return reinterpret_cast<vec<float>>(
      _mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(x)));
#else
  return times_power(p, shifted);
#endif
}

MFK_INLINE vec<float> absolute(vec<float> x) {
  return reinterpret_cast<vec<float>>(reinterpret_cast<mask<float>>(x) & 0x7fffffff);
}

// The share of the normal distribution beyond `size`, erfc(size / sqrt 2) / 2, within 5e-8 (6e-8 without
// fused multiply-adds): 2^Q(size), a fit up to 6, beyond which it counts as what it is there, 1e-9.
MFK_INLINE vec<float> normal_tail(vec<float> size) {
  const vec<float> t = smaller(splat(6.0f), size);
  vec<float> q = splat(3.7957574e-07f);
  q = q * t - 7.8544e-06f;
  q = q * t + 6.616205e-05f;
  q = q * t - 2.6063083e-04f;
  q = q * t - 2.083009e-05f;
  q = q * t + 0.0069615603f;
  q = q * t - 0.052448552f;
  q = q * t - 0.45921856f;
  q = q * t - 1.1511045f;
  q = q * t - 1.0f;
  return exp2_normal(q);
}

// The same for sizes up to 5.5 within 1.7e-7 (2e-7 without fused multiply-adds), in half the time:
// 1/2 - s P(s^2) / Q(s^2), a least-squares fit.
MFK_INLINE vec<float> quick_normal_tail(vec<float> size) {
  const vec<float> t = size * size;
  vec<float> p = splat(2.27493384e-08f), q = splat(1.19749961e-06f);
  p = p * t + 6.3520738e-06f;
  q = q * t + 7.36467191e-05f;
  p = p * t + 0.00016882371f;
  q = q * t + 0.00188443379f;
  p = p * t + 0.00467724819f;
  q = q * t + 0.0286457706f;
  p = p * t + 0.0338524841f;
  q = q * t + 0.251521558f;
  p = p * t + 0.398942262f;
  q = q * t + 1.0f;
  return larger(vec<float>{}, 0.5f - size * (p / q));
}

// x Phi(x), Phi being the share of the normal distribution below x, within 1.9e-7 of |x| (2.3e-7 without
// fused multiply-adds; PyTorch's is within 1.1e-7): max(x, 0) - |x| (1 - Phi(|x|)), whose second part counts
// as zero beyond 5.5. Zero for minus infinity, where the product is NaN.
MFK_INLINE vec<float> gelu(vec<float> x) {
  const vec<float> size = smaller(splat(5.5f), absolute(x));
  return larger(vec<float>{}, x) - size * quick_normal_tail(size);
}
// The same within 1.1e-7 of |x| (1.3e-7 without fused multiply-adds), and for infinities what the product is,
// too: infinity and NaN.
MFK_INLINE vec<float> strict_gelu(vec<float> x) {
  const vec<float> size = absolute(x);
  const vec<float> tail = size > 6.0f ? vec<float>{} : normal_tail(size);
  return x * (x < 0 ? tail : 1.0f - tail);
}
// Its derivative, Phi(x) + x phi(x), phi being the normal distribution's density, within 1.5e-7 (1.7e-7
// without fused multiply-adds); NaN for infinities.
MFK_INLINE vec<float> gelu_slope(vec<float> x) {
  const vec<float> size = absolute(x), tail = normal_tail(size);
  const vec<float> t = smaller(splat(12.0f), size);  // beyond it the density is zero beside the rest
  const vec<float> bump = t * 0.39894228040143267794f * exp2_normal(t * t * -0.72134752044448170368f);
  return (x < 0 ? tail - bump : 1.0f - tail + bump) + (x - x);
}

// In double by the C library's error function, a lane after the other.
MFK_INLINE vec<double> below(vec<double> x) {
  vec<double> y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = 0.5 * __builtin_erfc(-0.70710678118654752440 * x[i]);
  return y;
}
MFK_INLINE vec<double> strict_gelu(vec<double> x) { return x * below(x); }
MFK_INLINE vec<double> gelu_slope(vec<double> x) {
  return below(x) + x * exp(x * x * -0.5) * 0.39894228040143267794;
}

template <class C>
MFK_INLINE C exp_scalar(C x) {
  return exp(splat(x))[0];
}

}  // namespace MFK_ISA
}  // namespace mfk
