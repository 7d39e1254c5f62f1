#pragma once

#include "../../isa.h"
#include "../feature_map.h"
#include "../sizes.h"

namespace mfk {

// The two passes over a map; what lies between them is done in csrc/ops.
struct ResponseSumsArgs {
  Dtype dtype;
  int64_t batch, channels, pixels;
  AnyMap x, g;
  bool both;  // else only the squares
  // (B, C) each: sums over the pixels of x^2, x g and g.
  double *squares, *products, *sums;
};
// out = scale * a + other * b with both, else scale * a + shift; scale and other (B, C), shift (C).
struct ResponseApplyArgs {
  Dtype dtype;
  int64_t batch, channels, pixels;
  AnyMap a, b, out;
  bool both;
  const double *scale, *other, *shift;
};

// Tasks: one a group of 16 channels of a sample.
constexpr int64_t kResponseChannels = 16;
MFK_DECLARE_KERNEL(response_sums, ResponseSumsArgs)
MFK_DECLARE_KERNEL(response_apply, ResponseApplyArgs)

}  // namespace mfk
