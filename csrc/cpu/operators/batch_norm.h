#pragma once

#include "../../isa.h"
#include "../feature_map.h"
#include "../sizes.h"

namespace mfk {

// Everything of a channel is done in one task, while the channel is in cache: its statistics, then its
// pixels. Where the forward pass is given the statistics, a task is a channel of one sample, the sample
// slowest. Numbers by channel are doubles, (C).
struct BatchNormArgs {
  Dtype dtype;
  int64_t batch, channels, pixels;
  AnyMap x, y;
  bool measure, gelu;
  double eps;
  const double *weight, *bias;
  // Written where `measure`, else given; the factor is weight / sqrt(variance + eps).
  double *mean, *variance, *factor;
};

struct BatchNormBackwardArgs {
  Dtype dtype;
  int64_t batch, channels, pixels;
  AnyMap x, grad_y, grad_x;
  bool measured, gelu;  // whether the statistics are those of x
  double eps;
  const double *bias, *mean, *variance, *factor;
  const double *grad_mean, *grad_variance;  // of the statistics as results; read where `measured`
  // Of d, the gradient before the activation: sums of d and of d (x - mean).
  double *sums, *products;
};

// Channels of a task: where lanes are channels, as many as the widest vector has.
inline int64_t norm_channels(const AnyMap& x) { return x.stride_p == 1 ? 1 : 16; }
MFK_DECLARE_KERNEL(batch_norm, BatchNormArgs)
MFK_DECLARE_KERNEL(batch_norm_backward, BatchNormBackwardArgs)

}  // namespace mfk
