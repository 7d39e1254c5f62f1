#include "batch_norm.h"

#include "../simd/elementary.h"
#include "../simd/tile.h"

namespace mfk {
namespace MFK_ISA {
namespace {

// What one run of a kernel goes over, in samples first to last-1: with kRows one channel, lanes being pixels;
// else as many channels as a vector has lanes, of one pixel after the other.
template <class C, bool kRows>
struct Group {
  static constexpr int64_t n = kLanes<C>;
  int64_t first, last, c, channels;

  // Calls f(b, p, lanes) for every vector of the channels.
  template <class Args, class F>
  MFK_INLINE void each(const Args& args, F f) const {
    for (int64_t b = first; b < last; ++b) {
      if constexpr (kRows) {
        int64_t p = 0;
        for (; p + n <= args.pixels; p += n) f(b, p, n);
        if (p < args.pixels) f(b, p, args.pixels - p);
      } else if (channels == n) {
        for (int64_t p = 0; p < args.pixels; ++p) f(b, p, n);
      } else {
        for (int64_t p = 0; p < args.pixels; ++p) f(b, p, channels);
      }
    }
  }
  // Sums by channel, and numbers by channel for every lane.
  MFK_INLINE void store_sums(const WideSum<C>& sum, double* to) const {
    if constexpr (kRows) {
      *to = sum_lanes<C>(sum);
    } else {
      sum.store_upto(to, channels);
    }
  }
  template <class F>
  MFK_INLINE vec<C> lanes(F number) const {
    if constexpr (kRows) {
      return splat(static_cast<C>(number(c)));
    } else {
      C values[n] = {};
      for (int64_t i = 0; i < channels; ++i) values[i] = static_cast<C>(number(c + i));
      return load(values);
    }
  }
};

// f(group) for the tasks, each some channels of all samples or, with `apart`, of one.
template <class T, class Args, class F>
MFK_INLINE void each_group(const Args& args, bool apart, int64_t begin, int64_t end, F f) {
  using C = compute_t<T>;
  const int64_t size = norm_channels(args.x), groups = blocks_of(args.channels, size);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = apart ? task / groups : 0, samples = apart ? b + 1 : args.batch;
    const int64_t first = task % groups * size;
    const int64_t last = args.channels < first + size ? args.channels : first + size;
    if (size == 1) {
      f(Group<C, true>{b, samples, first, 1});
      continue;
    }
    for (int64_t c = first; c < last; c += kLanes<C>) {
      f(Group<C, false>{b, samples, c, last - c < kLanes<C> ? last - c : kLanes<C>});
    }
  }
}

// Zero in the lanes from `count` on.
template <class C>
MFK_INLINE vec<C> first_of(vec<C> v, int64_t count) {
  if (count == kLanes<C>) return v;
  return first_lanes<C>(count) ? v : vec<C>{};
}

// z = (x - mean) scale + shift. The mean is subtracted first: where it is large beside the deviation, a
// product with x itself would be rounded to fewer digits. What rounding the mean leaves off is in the shift.
template <class C>
struct Normal {
  vec<C> mean, scale, shift;

  template <class Args, class G>
  MFK_INLINE Normal(const Args& args, const G& group) {
    mean = group.lanes([&](int64_t c) { return args.mean[c]; });
    scale = group.lanes([&](int64_t c) { return args.factor[c]; });
    shift = group.lanes([&](int64_t c) {
      const double rounded = (static_cast<C>(args.mean[c]) - args.mean[c]) * args.factor[c];
      return __builtin_isfinite(rounded) ? args.bias[c] + rounded : args.bias[c];
    });
  }
  MFK_INLINE vec<C> operator()(vec<C> x) const { return (x - mean) * scale + shift; }
};

template <class T, class G>
MFK_INLINE void measure(const BatchNormArgs& args, const G& group) {
  using C = compute_t<T>;
  const auto x = args.x.as<const T>();
  const double count = static_cast<double>(args.batch * args.pixels);
  WideSum<C> total, squares;
  group.each(args, [&](int64_t b, int64_t p, int64_t lanes)
                       __attribute__((always_inline)) { total.add(load_upto(x.at(b, group.c, p), lanes)); });
  double* mean = args.mean + group.c;
  group.store_sums(total, mean);
  for (int64_t i = 0; i < group.channels; ++i) mean[i] /= count;
  const vec<C> middle = group.lanes([&](int64_t c) { return args.mean[c]; });
  group.each(args, [&](int64_t b, int64_t p, int64_t lanes) __attribute__((always_inline)) {
    const vec<C> distance = first_of<C>(load_upto(x.at(b, group.c, p), lanes) - middle, lanes);
    squares.add(distance * distance);
  });
  double* variance = args.variance + group.c;
  group.store_sums(squares, variance);
  for (int64_t i = 0; i < group.channels; ++i) {
    const double off = mean[i] - static_cast<C>(mean[i]);  // the distances are from the rounded mean
    variance[i] = variance[i] / count - off * off;
    args.factor[group.c + i] = args.weight[group.c + i] / __builtin_sqrt(variance[i] + args.eps);
  }
}

template <class T, bool kGelu, class G>
MFK_INLINE void apply(const BatchNormArgs& args, const G& group) {
  using C = compute_t<T>;
  const auto x = args.x.as<const T>();
  const auto y = args.y.as<T>();
  const Normal<C> normal(args, group);
  group.each(args, [&](int64_t b, int64_t p, int64_t lanes) __attribute__((always_inline)) {
    const vec<C> z = normal(load_upto(x.at(b, group.c, p), lanes));
    store_upto(y.at(b, group.c, p), kGelu ? strict_gelu(z) : z, lanes);
  });
}

// With inv = 1 / sqrt(variance + eps), n pixels, d the gradient before the activation, and the statistics
// those of x: dx = weight inv (d - sum(d) / n - (x - mean) inv^2 sum(d (x - mean)) / n) + dmean / n
// + 2 dvariance (x - mean) / n.
template <class T, bool kGelu, bool kMeasured, class G>
MFK_INLINE void backward(const BatchNormBackwardArgs& args, const G& group) {
  using C = compute_t<T>;
  const auto x = args.x.as<const T>(), grad = args.grad_y.as<const T>();
  const auto out = args.grad_x.as<T>();
  const Normal<C> normal(args, group);
  WideSum<C> sum, product;
  group.each(args, [&](int64_t b, int64_t p, int64_t lanes) __attribute__((always_inline)) {
    const vec<C> distance = first_of<C>(load_upto(x.at(b, group.c, p), lanes) - normal.mean, lanes);
    vec<C> d = load_upto(grad.at(b, group.c, p), lanes);
    if constexpr (kGelu) {
      d *= gelu_slope(distance * normal.scale + normal.shift);
      if (kMeasured) store_upto(out.at(b, group.c, p), d, lanes);  // cheaper to read than to make again
    }
    if (!kMeasured) store_upto(out.at(b, group.c, p), d * normal.scale, lanes);
    sum.add(d);
    product.add(d * distance);
  });
  double *sums = args.sums + group.c, *products = args.products + group.c;
  group.store_sums(sum, sums);
  group.store_sums(product, products);
  if constexpr (!kMeasured) return;

  const double count = static_cast<double>(args.batch * args.pixels);
  auto slope = [&](int64_t c) {
    const double through = args.factor[c] / (args.variance[c] + args.eps) * args.products[c];
    return (2 * args.grad_variance[c] - through) / count;
  };
  const vec<C> by_distance = group.lanes(slope);
  const vec<C> constant =
      group.lanes([&](int64_t c) { return (args.grad_mean[c] - args.factor[c] * args.sums[c]) / count; });
  const auto d = kGelu ? args.grad_x.as<const T>() : grad;
  group.each(args, [&](int64_t b, int64_t p, int64_t lanes) __attribute__((always_inline)) {
    const vec<C> distance = load_upto(x.at(b, group.c, p), lanes) - normal.mean;
    const vec<C> rest = distance * by_distance + constant;
    const vec<C> value = load_upto(d.at(b, group.c, p), lanes) * normal.scale + rest;
    store_upto(out.at(b, group.c, p), value, lanes);
  });
}

}  // namespace

void batch_norm(const BatchNormArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    each_group<T>(args, !args.measure, begin, end, [&](auto group) {
      if (args.measure) measure<T>(args, group);
      args.gelu ? apply<T, true>(args, group) : apply<T, false>(args, group);
    });
  });
}

void batch_norm_backward(const BatchNormBackwardArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    each_group<T>(args, false, begin, end, [&](auto group) {
      if (args.measured) {
        args.gelu ? backward<T, true, true>(args, group) : backward<T, false, true>(args, group);
      } else {
        args.gelu ? backward<T, true, false>(args, group) : backward<T, false, false>(args, group);
      }
    });
  });
}

}  // namespace MFK_ISA
}  // namespace mfk
