// The gradient of a maximum.
#pragma once

#include "../simd/vec.h"

namespace mfk {
namespace MFK_ISA {

// g split evenly among the functions that attain the maximum; parts[k] is what function k gets. Where x is
// NaN no function equals the maximum, and the parts are NaN, as those of torch.amax are.
template <int K, class C>
MFK_INLINE void split_gradient(vec<C> g, const vec<C>* values, vec<C>* parts, int64_t functions) {
  const int64_t count = K == 0 ? functions : K;
  if constexpr (K == 2) {
    const vec<C> one = splat(C(1)), half = splat(C(0.5)), a = values[0], b = values[1];
    const vec<C> nan = splat(static_cast<C>(__builtin_nanf("")));
    const vec<C> first = a > b ? one : (a < b ? vec<C>{} : (a == b ? half : nan));
    parts[0] = first * g;
    parts[1] = (one - first) * g;
    return;
  }
  vec<C> best = values[0];
  for (int64_t k = 1; k < count; ++k) best = maximum(best, values[k]);
  vec<C> ties{};
  for (int64_t k = 0; k < count; ++k) {
    parts[k] = values[k] == best ? splat(C(1)) : vec<C>{};
    ties += parts[k];
  }
  const vec<C> share = g / ties;
  for (int64_t k = 0; k < count; ++k) parts[k] *= share;
}

}  // namespace MFK_ISA
}  // namespace mfk
