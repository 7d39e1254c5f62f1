// Linear layers and norms of a few rows (tokens), with weights as PyTorch has them: (outputs, inputs).
#pragma once

#include "../simd/tile.h"
#include "../simd/tile_gemm.h"
#include "../sizes.h"

namespace mfk {
namespace MFK_ISA {

// Rows in the compute type, `stride` apart, a multiple of 16; beyond their width they are zero.
template <class C>
struct TokenRows {
  C* data;
  int64_t count, width, stride;

  MFK_INLINE C* row(int64_t r) const { return data + r * stride; }
};

template <class T>
struct TokenLinear {
  const T *weight, *bias;  // bias may be null
  int64_t outputs, inputs;
};

// `width` numbers, and zeros after them.
template <class T, class C>
MFK_INLINE void load_row(const T* from, int64_t width, C* to, int64_t stride) {
  for (int64_t i = 0; i < stride; i += kLanes<C>) {
    store(to + i, i < width ? load_upto(from + i, width - i) : vec<C>{});
  }
}
template <class T, class C>
void load_rows(const T* from, TokenRows<C> to) {
  for (int64_t r = 0; r < to.count; ++r) load_row(from + r * to.width, to.width, to.row(r), to.stride);
}
template <class T, class C>
void store_rows(TokenRows<C> from, T* to) {
  for (int64_t r = 0; r < from.count; ++r) {
    for (int64_t i = 0; i < from.width; i += kLanes<C>) {
      store_upto(to + r * from.width + i, load(from.row(r) + i), from.width - i);
    }
  }
}

// y = x W^T + b of many rows: they are in the lanes, so that their columns are transposed, not the weights.
template <class T, class C>
void linear_forward_columns(const TokenLinear<T>& linear, TokenRows<C> x, TokenRows<C> y) {
  constexpr int64_t kOutputs = 48;
  constexpr bool kConverted = !std::is_same<T, C>::value;
  const int64_t width = round_up(x.count, kLanes<C>), inputs = linear.inputs;
  const int64_t stride = kConverted ? padded(inputs) : inputs;
  Buffer<C> columns(inputs * width), sums(kOutputs * width), converted(kConverted ? kOutputs * stride : 0);
  load_tile<C>(FeatureMap<const C>{x.data, 0, 1, x.stride}, 0, 0, inputs, 0, x.count, columns);
  for (int64_t o = 0; o < linear.outputs; o += kOutputs) {
    const int64_t outputs = linear.outputs - o < kOutputs ? linear.outputs - o : kOutputs;
    const C* weight;
    if constexpr (kConverted) {
      load_rows(linear.weight + o * inputs, TokenRows<C>{converted, outputs, inputs, stride});
      weight = converted;
    } else {
      weight = linear.weight + o * inputs;
    }
    for (int64_t i = 0; i < outputs; ++i) {
      const vec<C> bias = splat(linear.bias == nullptr ? C(0) : to_compute(linear.bias[o + i]));
      for (int64_t j = 0; j < width; j += kLanes<C>) store(sums + i * width + j, bias);
    }
    multiply_pixels<C>(sums, width, sums, width, outputs, Matrix<C>{weight, stride, 1}, inputs, columns,
                       width, width);
    store_tile<C>(FeatureMap<C>{y.data, 0, 1, y.stride}, 0, o, outputs, 0, x.count, sums, width);
  }
  for (int64_t r = 0; r < y.count; ++r) {
    for (int64_t i = linear.outputs; i < y.stride; ++i) y.row(r)[i] = 0;
  }
}

// From so many rows on that is faster (measured).
constexpr int64_t kManyRows = 12;

// y = x W^T + b.
template <class T, class C>
void linear_forward(const TokenLinear<T>& linear, TokenRows<C> x, TokenRows<C> y) {
  constexpr int64_t n = kLanes<C>;
  if (x.count >= kManyRows) return linear_forward_columns(linear, x, y);
  for (int64_t o = 0; o < y.stride; o += n) {
    const int64_t outputs = linear.outputs - o;  // in this vector, where fewer than n
    if (outputs <= 0) {
      for (int64_t r = 0; r < x.count; ++r) store(y.row(r) + o, vec<C>{});
      continue;
    }
    const T* weights[n];
    for (int64_t j = 0; j < n; ++j) weights[j] = linear.weight + (o + (j < outputs ? j : 0)) * linear.inputs;
    const vec<C> bias = linear.bias == nullptr ? vec<C>{} : load_upto(linear.bias + o, outputs);
    for (int64_t r = 0; r < x.count; ++r) {
      vec<C> totals[n] = {};
      const C* row = x.row(r);
      const int64_t whole = linear.inputs / n * n;
      for (int64_t i = 0; i < whole;) {
        vec<C> sums[n] = {};  // short chains gather smaller errors
        const int64_t end = i + 8 * n < whole ? i + 8 * n : whole;
        for (; i < end; i += n) {
          const vec<C> value = load(row + i);
          for (int64_t j = 0; j < n; ++j) sums[j] += value * load(weights[j] + i);
        }
        for (int64_t j = 0; j < n; ++j) totals[j] += sums[j];
      }
      if (whole < linear.inputs) {
        const vec<C> value = load(row + whole);
        for (int64_t j = 0; j < n; ++j)
          totals[j] += value * load_part(weights[j] + whole, linear.inputs - whole);
      }
      const vec<C> total = sums_across<C, n>(totals) + bias;
      store(y.row(r) + o, outputs >= n ? total : (first_lanes<C>(outputs) ? total : vec<C>{}));
    }
  }
}

// x = g W, added to `start` where there is one: the gradient of a linear layer's input.
template <class T, class C>
void linear_backward(const TokenLinear<T>& linear, TokenRows<C> g, const C* start, TokenRows<C> x) {
  const int64_t whole = linear.inputs / kLanes<C> * kLanes<C>, rest = x.stride - whole;
  auto columns = [&](int64_t first, int64_t width, auto weights) {
    multiply_pixels<C>(x.data + first, x.stride, start == nullptr ? nullptr : start + first, x.stride,
                       g.count, Matrix<C>{g.data, g.stride, 1}, linear.outputs, weights, width);
  };
  columns(0, whole, RowsBy<T>{linear.weight, linear.inputs});
  if (rest == 0) return;
  Buffer<C> last(linear.outputs * rest);  // not to read beyond the weights
  for (int64_t o = 0; o < linear.outputs; ++o) {
    load_row(linear.weight + o * linear.inputs + whole, linear.inputs - whole, last + o * rest, rest);
  }
  columns(whole, rest, RowsBy<C>{last, rest});
}

// The sums over rows of `value(r, i)`, i counting in vectors, for columns `from` to `to` - 1.
template <class C, class T, class F>
void sum_rows(int64_t rows, int64_t from, int64_t to, T* out, F value) {
  constexpr int64_t n = kLanes<C>;
  for (int64_t i = from; i < to; i += n) {
    WideSum<C> total;
    for (int64_t r = 0; r < rows; ++r) total.add(value(r, i));
    double sums[n];
    total.store_upto(sums, n);
    for (int64_t j = 0; j < n && i + j < to; ++j) store_scalar(out + i + j, static_cast<C>(sums[j]));
  }
}

// dW[o] = sum_r g[r][o] x[r] and db[o] = sum_r g[r][o], for outputs o0 to o1 - 1.
template <class T, class C>
void linear_weight_gradient(TokenRows<C> g, TokenRows<C> x, int64_t o0, int64_t o1, T* weight, T* bias) {
  Buffer<C> sums((o1 - o0) * x.stride);
  const TokenRows<C> out{sums, o1 - o0, x.width, x.stride};
  multiply_pixels<C>(out.data, out.stride, nullptr, 0, out.count, Matrix<C>{g.data + o0, 1, g.stride},
                     x.count, x.data, x.stride, x.stride);
  store_rows(out, weight + o0 * x.width);
  if (bias == nullptr) return;
  sum_rows<C>(g.count, o0, o1, bias, [&](int64_t r, int64_t i) { return load(g.row(r) + i); });
}

// The mean of `value(i)` over a row of `width`, i counting in vectors, in two parts: rounded to one, it would
// be off alike for all columns, and what is off alike does not cancel in sums over them. The value beyond the
// width must be zero.
template <class C>
struct RowMean {
  C high = 0, low = 0;

  template <class F>
  MFK_INLINE RowMean(int64_t width, F value) {
    WideSum<C> first, rest;
    for (int64_t i = 0; i < width; i += kLanes<C>) first.add(value(i));
    high = static_cast<C>(sum_lanes<C>(first) / width);
    for (int64_t i = 0; i < width; i += kLanes<C>) rest.add(inside(value(i) - high, width - i));
    low = static_cast<C>(sum_lanes<C>(rest) / width);
  }
  MFK_INLINE vec<C> off(vec<C> value) const { return value - high - low; }

  static MFK_INLINE vec<C> inside(vec<C> value, int64_t lanes) {
    return lanes >= kLanes<C> ? value : (first_lanes<C>(lanes) ? value : vec<C>{});
  }
};

// The rows without their mean and with variance one; `scales` holds 1 / sqrt(variance + eps) of each.
template <class C>
void normalise_rows(TokenRows<C> x, double eps, TokenRows<C> out, C* scales) {
  constexpr int64_t n = kLanes<C>;
  for (int64_t r = 0; r < x.count; ++r) {
    const RowMean<C> mean(x.width, [&](int64_t i) { return load(x.row(r) + i); });
    WideSum<C> squares;
    for (int64_t i = 0; i < x.stride; i += n) {
      vec<C> value{};
      if (i < x.width) value = mean.inside(mean.off(load(x.row(r) + i)), x.width - i);
      store(out.row(r) + i, value);
      squares.add(value * value);
    }
    scales[r] = static_cast<C>(1 / __builtin_sqrt(sum_lanes<C>(squares) / x.width + eps));
    for (int64_t i = 0; i < x.width; i += n) store(out.row(r) + i, load(out.row(r) + i) * scales[r]);
  }
}

// gamma x + beta, x being normalised.
template <class T, class C>
void scale_rows(TokenRows<C> x, const T* gamma, const T* beta, TokenRows<C> out) {
  for (int64_t r = 0; r < x.count; ++r) {
    for (int64_t i = 0; i < x.width; i += kLanes<C>) {
      const int64_t rest = x.width - i;
      store(out.row(r) + i, load(x.row(r) + i) * load_upto(gamma + i, rest) + load_upto(beta + i, rest));
    }
    for (int64_t i = round_up(x.width, kLanes<C>); i < x.stride; i += kLanes<C>)
      store(out.row(r) + i, vec<C>{});
  }
}

// With x normalised, s its scale and h = gamma g: s (h - mean(h) - x mean(h x)), added to `start` where there
// is one.
template <class T, class C>
void norm_backward(TokenRows<C> x, const C* scales, TokenRows<C> g, const T* gamma, const C* start,
                   TokenRows<C> out) {
  constexpr int64_t n = kLanes<C>;
  for (int64_t r = 0; r < x.count; ++r) {
    auto h = [&](int64_t i) { return load(g.row(r) + i) * load_upto(gamma + i, x.width - i); };
    const RowMean<C> mean(x.width, h);
    const RowMean<C> product(x.width, [&](int64_t i) { return h(i) * load(x.row(r) + i); });
    for (int64_t i = 0; i < x.stride; i += n) {
      vec<C> value{};
      if (i < x.width) {
        const vec<C> at = load(x.row(r) + i);
        value = (mean.off(h(i)) - at * product.high - at * product.low) * scales[r];
        value = mean.inside(value, x.width - i);
        if (start != nullptr) value += load(start + r * x.stride + i);
      }
      store(out.row(r) + i, value);
    }
  }
}

// dgamma = sum_r g x and dbeta = sum_r g, of all columns.
template <class T, class C>
void norm_weight_gradient(TokenRows<C> x, TokenRows<C> g, T* gamma, T* beta) {
  auto grad = [&](int64_t r, int64_t i) { return load(g.row(r) + i); };
  sum_rows<C>(x.count, 0, x.width, gamma,
              [&](int64_t r, int64_t i) { return grad(r, i) * load(x.row(r) + i); });
  sum_rows<C>(x.count, 0, x.width, beta, grad);
}

}  // namespace MFK_ISA
}  // namespace mfk
