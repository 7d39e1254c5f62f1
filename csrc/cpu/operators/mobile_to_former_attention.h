#pragma once

#include "../../isa.h"
#include "../feature_map.h"

namespace mfk {

// out[b,m,c] = sum_p softmax_p(scale * sum_c q x)[m,p] * x[c,p], per head.
struct MobileToFormerArgs {
  Dtype dtype;
  int64_t batch, channels, pixels, tokens, heads;
  double scale;
  AnyMap x;
  const void* q;  // (B,M,C), contiguous
  void* logits;   // (B,heads,M,P), contiguous, or null
  // (B,P), contiguous, not 0 where a pixel takes no part; or null.
  const uint8_t* mask;
  // A head's pixels are done in `splits` parts of `split` pixels, tile by tile of `tile` pixels. Partial
  // results, one a task: forward (M, 2 + C/heads): maximum, -inf where all pixels are masked, sum,
  // weighted sum of x; backward (M, C/heads): gradient of q.
  int64_t splits, split, tile;
  double* partial;
  // Backward.
  const void* grad_out;       // (B,M,C), contiguous, or null
  const void* grad_logits;    // (B,heads,M,P), contiguous, or null
  const void* softmax_stats;  // (B,heads,M,2), contiguous, in the compute type
  // What the first step of the backward pass leaves to the second, one a task: the softmax weights P and
  // their gradients dP, both M rows tile by tile in `room` numbers of the compute type; and sum_p P dP, (M).
  int64_t room;
  void *weights, *grad_weights;
  double* products;
  AnyMap grad_x;
};

// The last step of the forward pass, over the partial results.
struct MobileToFormerCombineArgs {
  Dtype dtype;
  int64_t channels, tokens, heads, splits;
  const double* partial;
  void* out;  // (B,M,C)
  // (B,heads,M,2), in the compute type: each row's largest logit, and the sum of exp(logit - largest).
  // Not their logsumexp, which would round every weight by the last place of the largest logit.
  void* softmax_stats;
};

// Tasks: one a triple of a sample, a head and a split; to combine, one a pair of a sample and a head.
MFK_DECLARE_KERNEL(mobile_to_former_forward, MobileToFormerArgs)
MFK_DECLARE_KERNEL(mobile_to_former_combine, MobileToFormerCombineArgs)
MFK_DECLARE_KERNEL(mobile_to_former_backward_weights, MobileToFormerArgs)
MFK_DECLARE_KERNEL(mobile_to_former_backward, MobileToFormerArgs)

}  // namespace mfk
