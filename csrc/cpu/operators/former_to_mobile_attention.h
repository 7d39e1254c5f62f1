#pragma once

#include "../../isa.h"
#include "../feature_map.h"

namespace mfk {

// y[b,c,p] = x[b,c,p] + sum_m softmax_m(scale * sum_c x k)[p,m] * v[b,m,c], per head.
struct FormerToMobileArgs {
  Dtype dtype;
  int64_t batch, channels, pixels, tokens, heads;
  double scale;
  AnyMap x;
  const void* k;  // (B,M,C), contiguous
  const void* v;  // likewise
  AnyMap y;
  // A head's pixels are done in `splits` parts of `split` pixels, tile by tile of `tile` pixels.
  int64_t splits, split, tile;
  // Backward. Partial sums, one a task: (M, C/heads).
  AnyMap grad_y, grad_x;
  double* partial_k;
  double* partial_v;
};

// Tasks: one a triple of a sample, a head and a split.
MFK_DECLARE_KERNEL(former_to_mobile_forward, FormerToMobileArgs)
MFK_DECLARE_KERNEL(former_to_mobile_backward, FormerToMobileArgs)

}  // namespace mfk
