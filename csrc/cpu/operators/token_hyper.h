#pragma once

#include "../../isa.h"
#include "../feature_map.h"
#include "../sizes.h"

namespace mfk {

// For each of one or two networks: theta = hardsigmoid(W2 relu(W1 token + b1) + b2), in [0, 1]; slopes are
// 2 theta, less one for the second function.
struct HyperNet {
  int64_t hidden, outputs;
  const void *weight1, *bias1, *weight2, *bias2;
  void* slopes;  // (B, outputs), written
  // Backward.
  const void* grad_slopes;
  void* grads[4];  // of weight1, bias1, weight2, bias2
};
struct HyperArgs {
  Dtype dtype;
  int64_t batch, width, networks, functions;
  const void* token;  // (B, width), contiguous
  HyperNet nets[2];
  // Backward. `work` holds hyper_work(args) elements of the compute type a sample.
  void *work, *grad_token;
};

// The token; for each network its hidden units, their gradients, and the gradients of its outputs.
inline __attribute__((always_inline)) int64_t hyper_work(const HyperArgs& args) {
  int64_t sum = 2 * padded(args.width);
  for (int64_t i = 0; i < args.networks; ++i) {
    sum += 2 * padded(args.nets[i].hidden) + padded(args.nets[i].outputs);
  }
  return sum;
}

constexpr int64_t kHyperSamples = 32, kHyperOutputs = 48;  // of a task

// Tasks: one a group of 32 samples; likewise; for each layer of each network one a group of 48 outputs,
// numbered one after the other.
MFK_DECLARE_KERNEL(token_hyper_forward, HyperArgs)
MFK_DECLARE_KERNEL(token_hyper_backward, HyperArgs)
MFK_DECLARE_KERNEL(token_hyper_backward_weight, HyperArgs)

}  // namespace mfk
