#pragma once

#include "../../isa.h"
#include "../feature_map.h"
#include "../sizes.h"

namespace mfk {

// What is kept of each token from the forward to the backward pass, and between the steps of the latter:
// rows in the compute type, padded to a multiple of 16. All rows of the first array, then all of the second.
enum FormerRows {
  kInput,    // of the query layer: the tokens, or the normalised ones
  kQueries,  // queries; in the standard form also keys and values
  kAttended,
  kFirst,      // the tokens after the attention
  kFirstNorm,  // normalised, without gamma and beta
  kMiddle,     // what goes into the feed-forward network
  kHidden,     // before GELU
  kActive,     // after it
  kSecond,     // the tokens after the network
  kSecondNorm,
  // Gradients.
  kGradQueries,
  kGradAttended,
  kGradFirst,
  kGradFirstNorm,
  kGradMiddle,
  kGradHidden,
  kGradSecond,
  kGradSecondNorm,
  kGradOut,
  kFormerArrays
};

struct FormerArgs {
  Dtype dtype;
  bool standard;  // else the released form
  bool ffn;
  int64_t batch, tokens, width, hidden, heads;
  double eps;
  const void *x, *qkv_weight, *qkv_bias, *proj_weight, *proj_bias, *norm1_weight, *norm1_bias;
  const void *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias, *norm2_weight, *norm2_bias;
  void* y;
  int64_t samples;  // of a task
  // Backward. `work` holds former_work(args) elements of the compute type a token.
  const void* grad_y;
  void *work, *grad_x, *grads[12];  // of the parameters, in the order above; null where there is none
};

inline __attribute__((always_inline)) int64_t former_width(const FormerArgs& args, int array) {
  if (array == kHidden || array == kActive || array == kGradHidden) return args.hidden;
  const bool three = args.standard && (array == kQueries || array == kGradQueries);
  return three ? 3 * args.width : args.width;
}
// Elements a token: the arrays, and the scales of two norms.
inline __attribute__((always_inline)) int64_t former_work(const FormerArgs& args) {
  int64_t sum = 16;
  for (int i = 0; i < kFormerArrays; ++i) sum += padded(former_width(args, i));
  return sum;
}

constexpr int64_t kFormerOutputs = 48;  // of a task that makes gradients of weights

// Tasks: one a group of `samples` samples; likewise; for each layer one a group of 48 outputs, and one for
// the norms, numbered one after the other.
MFK_DECLARE_KERNEL(former_block_forward, FormerArgs)
MFK_DECLARE_KERNEL(former_block_backward, FormerArgs)
MFK_DECLARE_KERNEL(former_block_backward_weight, FormerArgs)

}  // namespace mfk
