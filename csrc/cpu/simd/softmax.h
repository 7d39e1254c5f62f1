// Softmax over the rows of (count, stride), for each of `width` columns by itself, and its gradient: pixels
// in the lanes, tokens or other pixels down the rows.
#pragma once

#include "elementary.h"

namespace mfk {
namespace MFK_ISA {

// term(0) + ... + term(count - 1). There may be thousands, and one running sum would gather errors.
template <class C, class F>
MFK_INLINE vec<C> sum_terms(int64_t count, F term) {
  constexpr int64_t kRun = 64;
  vec<C> total{};
  for (int64_t i = 0; i < count;) {
    const int64_t end = i + kRun < count ? i + kRun : count;
    vec<C> a{}, b{}, c{}, d{};
    for (; i + 4 <= end; i += 4) {
      a += term(i);
      b += term(i + 1);
      c += term(i + 2);
      d += term(i + 3);
    }
    if (i < end) a += term(i++);
    if (i < end) b += term(i++);
    if (i < end) c += term(i++);
    total += (a + b) + (c + d);
  }
  return total;
}

// softmax(scale * logits) in place.
template <class C>
void softmax_rows(C* logits, C scale, int64_t count, int64_t stride, int64_t width) {
  for (int64_t j = 0; j < width; j += kLanes<C>) {
    C* column = logits + j;
    vec<C> top = splat(-C(__builtin_inf()));
    for (int64_t i = 0; i < count; ++i) {
      const vec<C> value = load(column + i * stride) * scale;
      store(column + i * stride, value);
      top = value > top ? value : top;
    }
    const vec<C> sum = sum_terms<C>(count, [&](int64_t i) {
      const vec<C> weight = exp(load(column + i * stride) - top);
      store(column + i * stride, weight);
      return weight;
    });
    for (int64_t i = 0; i < count; ++i) store(column + i * stride, load(column + i * stride) / sum);
  }
}

// With w the weights and dP their gradients, in `grads`: w (dP - sum w dP) scale, the gradient of the logits
// before they were scaled, in place. dP counts from that of the largest weight, the pivot: where this is
// nearly one, the mean is nearly its dP, and their difference would lose its digits.
template <class C>
void softmax_rows_backward(const C* weights, C* grads, C scale, int64_t count, int64_t stride,
                           int64_t width) {
  for (int64_t j = 0; j < width; j += kLanes<C>) {
    const C* weight = weights + j;
    C* grad = grads + j;
    vec<C> top = load(weight), pivot = load(grad);
    for (int64_t i = 1; i < count; ++i) {
      const vec<C> value = load(weight + i * stride);
      pivot = value > top ? load(grad + i * stride) : pivot;
      top = value > top ? value : top;
    }
    const vec<C> mean = sum_terms<C>(
        count, [&](int64_t i) { return load(weight + i * stride) * (load(grad + i * stride) - pivot); });
    for (int64_t i = 0; i < count; ++i) {
      store(grad + i * stride, load(weight + i * stride) * (load(grad + i * stride) - pivot - mean) * scale);
    }
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
