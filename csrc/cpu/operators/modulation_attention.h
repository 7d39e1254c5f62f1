#pragma once

#include "../../isa.h"
#include "../feature_map.h"
#include "../sizes.h"

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
  AnyMap grad_y, grad_q, grad_k, grad_v, grad_gate;
  // Backward: the queries of a window in so many groups of so many, tiles of them. Of several each leaves its
  // sums for keys and values, modulation_sums(args) in the compute type.
  int64_t groups, group;
  void* partial;
};

constexpr int64_t kModulationTile = 32;  // queries

inline __attribute__((always_inline)) int64_t modulation_sums(const ModulationArgs& args) {
  const int64_t pixels = blocks_of(args.window_h * args.window_w, kModulationTile) * kModulationTile;
  return (args.depth + args.channels) * pixels;
}

// Tasks: one a triple of a sample, a window, and a tile of queries; likewise of a group of queries; where
// there are several groups one a window.
MFK_DECLARE_KERNEL(modulation_attention_forward, ModulationArgs)
MFK_DECLARE_KERNEL(modulation_attention_backward, ModulationArgs)
MFK_DECLARE_KERNEL(modulation_attention_backward_sum, ModulationArgs)

}  // namespace mfk
