#pragma once

#include "../isa.h"
#include "feature_map.h"
#include "sizes.h"

namespace mfk {

// Within each window, with P = softmax(scale q^T k): y = (sigmoid(v) P^T) sigmoid(gate), or, with `outside`,
// y = sigmoid(v P^T) sigmoid(gate).
struct ModulationArgs {
  Dtype dtype;
  bool outside;
  int64_t batch, depth, channels, width;
  int64_t window_h, window_w, windows_y, windows_x;  // one window of the whole map where there are none
  double scale;
  AnyMap q, k, v, gate, y;
  // Backward. What the first pass leaves for the second, in the compute type: of each window the gradient of
  // v P^T, (channels, pixels), and four numbers a query, (4, pixels).
  AnyMap grad_y, grad_q, grad_k, grad_v, grad_gate;
  void *grad_context, *softmax;
};

constexpr int64_t kModulationTile = 32;  // queries, or keys, of a task

// Tasks: one a triple of a sample, a window, and a tile of queries (keys in the second pass).
MFK_DECLARE_KERNEL(modulation_attention_forward, ModulationArgs)
MFK_DECLARE_KERNEL(modulation_attention_backward_q, ModulationArgs)
MFK_DECLARE_KERNEL(modulation_attention_backward_k, ModulationArgs)

}  // namespace mfk
