// A bias and then an activation that is known only when a step runs: products and convolutions, whose code is
// long, are compiled once for all of them. What is done to sums is chosen where a tile has been summed.
#pragma once

#include "../simd/gemm.h"
#include "deployed.h"

namespace mfk {
namespace MFK_ISA {

struct AddBiasActivation {
  const float* bias;
  int64_t activation;
  // Of kDynamicRelu the slopes for positive and for other values; of kScaledRelu6 `first` is the factor.
  const float *first = nullptr, *second = nullptr;

  // Calls f with the epilogue of this activation. One that has a pass of its own gets the bias here.
  template <class F>
  MFK_INLINE void choose(F f) const {
    switch (activation) {
      case kGelu:
        return f(AddBiasGelu{bias});
      case kHardswish:
        return f(AddBiasHardswish{bias});
      case kRelu:
        return f(AddBiasRelu{bias});
      case kRelu6:
        return f(AddBiasRelu6{bias});
      case kDynamicRelu:
        return f(AddBiasDynamicRelu{bias, first, second});
      case kScaledRelu6:
        return f(AddBiasScaledRelu6{bias, first});
      case kHardsigmoid:
        return f(AddBiasHardsigmoid{bias});
      default:
        return f(AddBias{bias});
    }
  }
};

template <class F>
MFK_INLINE void with_finish(const AddBiasActivation& epilogue, int64_t o, F f) {
  epilogue.choose([&](auto chosen) __attribute__((always_inline)) { f(chosen.at(o)); });
}

}  // namespace MFK_ISA
}  // namespace mfk
