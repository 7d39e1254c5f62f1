#pragma once

#include "../../isa.h"
#include "../feature_map.h"
#include "../sizes.h"

namespace mfk {

// y[b] = activation((W x[b] - mean) factor + bias); pixels of the maps lie side by side.
struct PointwiseConvBnArgs {
  Dtype dtype;
  int64_t batch, inputs, outputs, pixels;
  AnyMap x, y;
  bool gelu;
  const void* weight;                  // (outputs, inputs), contiguous, float or double as sums are
  const double *mean, *factor, *bias;  // (outputs)
};

// Tasks: one for each (sample, block of kPointwisePixels), which is whole blocks of any vectors.
constexpr int64_t kPointwisePixels = 768;
MFK_DECLARE_KERNEL(pointwise_conv_bn, PointwiseConvBnArgs)

}  // namespace mfk
