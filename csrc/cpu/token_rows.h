// Linear layers and norms of a few rows (tokens), with weights as PyTorch has them: (outputs, inputs).
#pragma once

#include "tile.h"

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

template <class T, class C>
void load_rows(const T* from, TokenRows<C> to) {
  for (int64_t r = 0; r < to.count; ++r) {
    for (int64_t i = 0; i < to.stride; i += kLanes<C>) {
      const int64_t rest = to.width - i;
      store(to.row(r) + i, rest > 0 ? load_upto(from + r * to.width + i, rest) : vec<C>{});
    }
  }
}
template <class T, class C>
void store_rows(TokenRows<C> from, T* to) {
  for (int64_t r = 0; r < from.count; ++r) {
    for (int64_t i = 0; i < from.width; i += kLanes<C>) {
      store_upto(to + r * from.width + i, load(from.row(r) + i), from.width - i);
    }
  }
}

// The sum of each vector's lanes.
template <class C>
MFK_INLINE vec<C> sums_across(vec<C> (&rows)[kLanes<C>]) {
  transpose<C>(rows);
  vec<C> sum{};
  for (int i = 0; i < kLanes<C>; ++i) sum += rows[i];
  return sum;
}

// y = x W^T + b.
template <class T, class C>
void linear_forward(const TokenLinear<T>& linear, TokenRows<C> x, TokenRows<C> y) {
  constexpr int64_t n = kLanes<C>;
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
      const vec<C> total = sums_across<C>(totals) + bias;
      store(y.row(r) + o, outputs >= n ? total : (first_lanes<C>(outputs) ? total : vec<C>{}));
    }
  }
}

// x = g W, added to `start` where there is one: the gradient of a linear layer's input.
template <class T, class C>
void linear_backward(const TokenLinear<T>& linear, TokenRows<C> g, const C* start, TokenRows<C> x) {
  constexpr int64_t n = kLanes<C>, kRows = 6;
  for (int64_t i = 0; i < x.stride; i += n) {
    const int64_t rest = linear.inputs - i;
    for (int64_t r = 0; r < x.count; r += kRows) {
      const int64_t rows = x.count - r < kRows ? x.count - r : kRows;
      vec<C> total[kRows] = {};
      for (int64_t o = 0; rest > 0 && o < linear.outputs;) {
        vec<C> sums[kRows] = {};
        const int64_t end = o + 8 < linear.outputs ? o + 8 : linear.outputs;
        for (; o < end; ++o) {
          const vec<C> weight = load_upto(linear.weight + o * linear.inputs + i, rest);
          for (int64_t k = 0; k < kRows; ++k) sums[k] += g.row(k < rows ? r + k : r)[o] * weight;
        }
        for (int64_t k = 0; k < kRows; ++k) total[k] += sums[k];
      }
      for (int64_t k = 0; k < rows; ++k) {
        if (start != nullptr) total[k] += load(start + (r + k) * x.stride + i);
        store(x.row(r + k) + i, total[k]);
      }
    }
  }
}

// dW[o] = sum_r g[r][o] x[r] and db[o] = sum_r g[r][o], for outputs o0 to o1 - 1.
template <class T, class C>
void linear_weight_gradient(TokenRows<C> g, TokenRows<C> x, int64_t o0, int64_t o1, T* weight, T* bias) {
  constexpr int64_t n = kLanes<C>, kRun = 8;
  for (int64_t o = o0; o < o1; ++o) {
    for (int64_t i = 0; i < x.width; i += n) {
      vec<C> total{};
      for (int64_t r = 0; r < x.count;) {
        vec<C> sum{};
        const int64_t end = r + kRun < x.count ? r + kRun : x.count;
        for (; r < end; ++r) sum += g.row(r)[o] * load(x.row(r) + i);
        total += sum;
      }
      store_upto(weight + o * x.width + i, total, x.width - i);
    }
    if (bias == nullptr) continue;
    long double sum = 0;
    for (int64_t r = 0; r < x.count; ++r) sum += g.row(r)[o];
    store_scalar(bias + o, static_cast<C>(sum));
  }
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
  constexpr int64_t n = kLanes<C>;
  for (int64_t i = 0; i < x.width; i += n) {
    WideSum<C> products, sums;
    for (int64_t r = 0; r < x.count; ++r) {
      const vec<C> grad = load(g.row(r) + i);
      products.add(grad * load(x.row(r) + i));
      sums.add(grad);
    }
    double product[n], sum[n];
    products.store_upto(product, n);
    sums.store_upto(sum, n);
    for (int64_t j = 0; j < n && i + j < x.width; ++j) {
      store_scalar(gamma + i + j, static_cast<C>(product[j]));
      store_scalar(beta + i + j, static_cast<C>(sum[j]));
    }
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
