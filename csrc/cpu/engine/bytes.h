// Numbers rounded to bytes, the inputs of int8 matrices.
#pragma once

#include "../simd/gemm.h"
#include "deployed.h"

namespace mfk {
namespace MFK_ISA {

// y * scale + zero, rounded to the nearest of 0 to 255, ties to even, as `store` takes it. Between product
// and sum stands a limit, so that no compiler makes one instruction of them: all processors round alike.
struct Bytes {
  float scale, least, most, zero;

  explicit MFK_INLINE Bytes(const PlanLinear& linear)
      : scale(float_from_bits(linear.scale)),
        least(-static_cast<float>(linear.zero)),
        most(255 - static_cast<float>(linear.zero)),
        zero(12582912 + static_cast<float>(linear.zero) - (kSignedBytes ? 128 : 0)) {}

  MFK_INLINE vec<float> operator()(vec<float> y) const {
    return smaller(larger(y * scale, splat(least)), splat(most)) + zero;
  }
  // The byte of 0.
  MFK_INLINE uint8_t nothing() const {
    uint8_t byte[kLanes<float>];
    store(byte, (*this)(vec<float>{}));
    return byte[0];
  }
  // Whole vectors.
  MFK_INLINE void round(const float* x, int64_t count, uint8_t* out) const {
    for (int64_t i = 0; i < count; i += kLanes<float>) store(out + i, (*this)(load(x + i)));
  }
};

// What an epilogue of gemm.h gives, rounded.
template <class Epilogue>
struct Rounded {
  Epilogue epilogue;
  Bytes bytes;
  struct At {
    decltype(std::declval<Epilogue>().at(0)) of_epilogue;
    vec<float> bias;
    Bytes bytes;
    MFK_INLINE vec<float> activate(vec<float> y) const { return bytes(of_epilogue.activate(y)); }
    MFK_INLINE vec<float> operator()(vec<float> y, int64_t p) const { return bytes(of_epilogue(y, p)); }
  };
  MFK_INLINE At at(int64_t o) const {
    const auto of_epilogue = epilogue.at(o);
    return {of_epilogue, of_epilogue.bias, bytes};
  }
};

// What products of a calibration find in their inputs: in the first two of `found` the smallest and the
// largest, or, where there are bins, how many are in each bin between `range[0]` and `range[1]`.
struct Finding {
  const double* range;
  double* found;
  int64_t bins;

  void add(const float* x, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      if (bins == 0) {
        found[0] = x[i] < found[0] || x[i] != x[i] ? x[i] : found[0];
        found[1] = x[i] > found[1] || x[i] != x[i] ? x[i] : found[1];
        continue;
      }
      const double place = (x[i] - range[0]) / (range[1] - range[0]) * bins;
      const double last = static_cast<double>(bins - 1);
      found[static_cast<int64_t>(place > 0 ? (place < last ? place : last) : 0)] += 1;
    }
  }
};

}  // namespace MFK_ISA
}  // namespace mfk
