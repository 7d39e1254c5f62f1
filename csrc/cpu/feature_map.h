// How kernels see a tensor (B, C, H, W): its pixels in one run, one of the two inner strides equal to 1.
#pragma once

#include <stdint.h>

namespace mfk {

enum class Dtype { kFloat, kDouble, kBf16 };

template <class T>
struct FeatureMap {
  T* data;
  int64_t stride_b, stride_c, stride_p;

  __attribute__((always_inline)) T* at(int64_t b, int64_t c, int64_t p) const {
    return data + b * stride_b + c * stride_c + p * stride_p;
  }
  // The same map with its element type known.
  template <class U>
  __attribute__((always_inline)) FeatureMap<U> as() const {
    return {static_cast<U*>(data), stride_b, stride_c, stride_p};
  }
};

// Element type not known yet.
template <>
struct FeatureMap<void> {
  void* data = nullptr;
  int64_t stride_b = 0, stride_c = 0, stride_p = 0;

  template <class U>
  __attribute__((always_inline)) FeatureMap<U> as() const {
    return {static_cast<U*>(data), stride_b, stride_c, stride_p};
  }
};
using AnyMap = FeatureMap<void>;

}  // namespace mfk
