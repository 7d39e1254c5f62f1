// CUDA's numbers of half precision and vectors, for the emulator.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
  float result;
  memcpy(&result, &wide, sizeof result);
  return result;
}
// To the nearest, to even ones in the middle.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t wide;
  memcpy(&wide, &value, sizeof wide);
  if (value != value) return {0x7fff};
  return {static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
}
inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  float result = exponent == 0 ? ldexpf(fraction, -24) : ldexpf(1024 + fraction, exponent - 25);
  if (exponent == 31) result = fraction == 0 ? INFINITY : NAN;
  return value.bits >> 15 ? -result : result;
}
inline __half __float2half_rn(float value) {
  const uint16_t sign = signbit(value) ? 0x8000 : 0;
  const float size = fabsf(value);
  if (value != value) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = size < 0x1p-14f ? -14 : ilogbf(size);
  // rintf rounds to even ones, too. A fraction that becomes 2048 is the next exponent's first, by adding.
  const int fraction = static_cast<int>(rintf(ldexpf(size, 10 - exponent)));
  return {static_cast<uint16_t>(sign | (((exponent + 14) << 10) + fraction))};
}
