#pragma once

#include <stdint.h>

namespace mfk {

// Images of a batch, (B, C, H, W) in float, any strides.
struct Images {
  const float* data;
  int64_t batch, height, width, stride_b, stride_c, stride_h, stride_w;
};

}  // namespace mfk
