#pragma once

#include "../../isa.h"
#include "../feature_map.h"

namespace mfk {

// y[b,c,p] = max_k(slopes[b,k,c] * x[b,c,p] + intercepts[b,k,c]); with tokens > 0 the coefficients are
// (B,M,K,C) and mixed with attention[b,m,p].
struct DynamicReluArgs {
  Dtype dtype;
  int64_t batch, channels, pixels, functions;
  int64_t tokens;          // M, or 0 without attention
  AnyMap x;                // read
  AnyMap y;                // forward: written
  AnyMap grad_y;           // backward: read; strides of the same kind as those of x
  AnyMap grad_x;           // backward: written; likewise
  const void* slopes;      // contiguous
  const void* intercepts;  // contiguous, or null
  const void* attention;   // contiguous (B,M,P), or null
  // Backward. Coefficients' gradients are sums over the pixels, made in `splits` parts of `split` pixels;
  // partial sums are (B, splits, coefficients of one sample).
  int64_t splits, split;
  double* partial_slopes;
  double* partial_intercepts;  // or null
  void* grad_attention;        // contiguous, or null
};

// Tasks: forward, one a row (B * C) where x has stride_p == 1, else one a pixel (B * P). Backward: one a pair
// of a sample and a split.
MFK_DECLARE_KERNEL(dynamic_relu_forward, DynamicReluArgs)
MFK_DECLARE_KERNEL(dynamic_relu_backward, DynamicReluArgs)
// With attention. Tasks: one a pair of a sample and a split.
MFK_DECLARE_KERNEL(mixed_relu_forward, DynamicReluArgs)
MFK_DECLARE_KERNEL(mixed_relu_backward, DynamicReluArgs)

}  // namespace mfk
