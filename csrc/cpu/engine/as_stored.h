// Rows of floats as the left side of a product.
#pragma once

#include "../simd/gemm.h"

namespace mfk {
namespace MFK_ISA {

// (rows, channels), each row padded; in `room`, of as many floats, where they must be rounded.
MFK_INLINE Rows<Stored> as_stored(const float* in, int64_t rows, int64_t stride, int64_t channels,
                                  Stored* room) {
  if constexpr (sizeof(Stored) == sizeof(float)) {
    return {reinterpret_cast<const Stored*>(in), stride, 1, channels, 0};
  }
  const int64_t width = padded(channels);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < width; c += kLanes<float>) store(room + r * width + c, load(in + r * stride + c));
  }
  return {room, width, 1, channels, 0};
}

}  // namespace MFK_ISA
}  // namespace mfk
