// What the kernels take from the device: numbers of half precision, and shared memory. With MFK_EMULATED a
// host compiler makes them into functions, for tests without a GPU.
#pragma once

#ifdef MFK_EMULATED
#include "emulator.h"
#define MFK_DYNAMIC_SHARED(name) float* name = emulator::shared()
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MFK_DYNAMIC_SHARED(name) extern __shared__ __align__(16) float name[]
#endif

namespace mfk {
namespace cuda {

__device__ inline float widen(float value) { return value; }
template <class T>
__device__ inline T narrow(float value) {
  return T(value);
}
// Four numbers in a row, of which the first is at a multiple of their size.
__device__ inline void load4(const float* from, float* to) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(__half value) { return __half2float(value); }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <class T>
__device__ inline void load4(const T* from, float* to) {
  static_assert(sizeof(T) == 2, "of half precision");
  const uint2 pairs = *reinterpret_cast<const uint2*>(from);
  const T* four = reinterpret_cast<const T*>(&pairs);
  for (int i = 0; i < 4; ++i) to[i] = widen(four[i]);
}

}  // namespace cuda
}  // namespace mfk
