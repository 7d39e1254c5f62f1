// Activations of numbers that lie in memory already, where none is part of the step before.
#pragma once

#include "../simd/elementary.h"
#include "deployed.h"

namespace mfk {
namespace MFK_ISA {

MFK_INLINE vec<float> sigmoid(vec<float> x) {
  const vec<float> small = exp_nonpositive(-absolute(x)), large = 1.0f / (1.0f + small);
  return x < 0 ? small * large : large;
}

MFK_INLINE vec<float> silu(vec<float> x) { return x * sigmoid(x); }

// Those that have a pass of their own; the others are part of products and convolutions.
MFK_INLINE bool has_pass(int64_t activation) { return activation == kSilu || activation == kSigmoid; }

// In place, of so many numbers, a multiple of 16.
template <class T>
void activation_pass(int64_t activation, T* x, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    const vec<float> value = load(x + i);
    store(x + i, activation == kSilu ? silu(value) : sigmoid(value));
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
