// Depthwise dynamic convolutions with stride 1, pixels of a channel in the lanes: a padded plane of each
// channel, of which every tap reads whole vectors.
#include "dynamic_kernels.h"

namespace mfk {
namespace MFK_ISA {
namespace {

// Channels of a task: their kernels are mixed together.
constexpr int64_t kChannels = kDepthwiseChannels;
// So many vectors are summed in the compute type before the sum goes into a double.
constexpr int64_t kVectors = 64;

// A channel's map with zeros around it.
template <class C>
struct Plane {
  const int64_t height, width, top, left, columns;
  Buffer<C> data;

  Plane(int64_t h, int64_t w, int64_t padding_h, int64_t padding_w)
      : height(h), width(w), top(padding_h), left(padding_w), columns(w + 2 * padding_w), data(size()) {
    memset(data, 0, size() * sizeof(C));
  }
  int64_t size() const { return (height + 2 * top) * columns + 2 * kLanes<C>; }
  // What a row's last vector writes beyond it is zero, and so is what belongs there or comes next.
  template <class T>
  void fill(const T* map) {
    for (int64_t y = 0; y < height; ++y) {
      C* to = data + (y + top) * columns + left;
      for (int64_t x = 0; x < width; x += kLanes<C>) store(to + x, load_upto(map + y * width + x, width - x));
    }
  }
};

// Where the taps of an output read, from its place in the plane.
struct Taps {
  const int64_t count, width, down, right;  // kernel width; elements from tap to tap
  Taps(const DynamicConvArgs& args, int64_t columns)
      : count(args.kernel_h * args.kernel_w),
        width(args.kernel_w),
        down(args.dilation_h * columns),
        right(args.dilation_w) {}
  template <int kTaps>
  int64_t at(int64_t tap) const {
    const int64_t columns = kTaps == 9 ? 3 : width;
    return tap / columns * down + tap % columns * right;
  }
};

// With kTaps = 9 of a 3x3 kernel, with 0 of any other. The taps' weights are read in steps of `step`.
template <int kTaps, class T, class C>
void convolve(const C* plane, int64_t columns, const Taps& taps, const C* weights, int64_t step, C bias,
              T* out, int64_t height, int64_t width) {
  const int64_t count = kTaps == 0 ? taps.count : kTaps;
  vec<C> w[kTaps == 0 ? 1 : kTaps];
  for (int64_t t = 0; t < kTaps; ++t) w[t] = splat(weights[t * step]);
  for (int64_t r = 0; r < height; ++r) {
    for (int64_t c = 0; c < width; c += kLanes<C>) {
      const C* from = plane + r * columns + c;
      vec<C> sum = splat(bias);
      for (int64_t t = 0; t < count; ++t) {
        sum += (kTaps == 0 ? splat(weights[t * step]) : w[t]) * load(from + taps.at<kTaps>(t));
      }
      store_upto(out + r * width + c, sum, width - c);
    }
  }
}

template <class T, int kTaps>
void forward(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  Plane<C> plane(args.height, args.width, args.padding_h, args.padding_w);
  const Taps taps(args, plane.columns);
  Buffer<C> kernel(round_up(kChannels * taps.count, kLanes<C>));
  const int64_t blocks = blocks_of(args.groups, kChannels);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / blocks, c = task % blocks * kChannels;
    const int64_t channels = least(kChannels, args.groups - c);
    mix<1, T>(args, b, 1, c, channels, taps.count, static_cast<C*>(kernel));
    for (int64_t i = 0; i < channels; ++i) {
      plane.fill(args.x.as<const T>().at(b, c + i, 0));
      convolve<kTaps>(static_cast<const C*>(plane.data), plane.columns, taps, kernel + i * taps.count, 1,
                      mixed_bias<T, C>(args, b, c + i), args.y.as<T>().at(b, c + i, 0), args.out_height,
                      args.out_width);
    }
  }
}

// grad[tap] += sum of g and what the tap read, grad_bias += sum of g.
template <int kTaps, class T, class C>
void correlate(const C* plane, int64_t columns, const Taps& taps, const T* g, int64_t height, int64_t width,
               double* grad, double* grad_bias) {
  constexpr int64_t n = kLanes<C>;
  const int64_t vectors = blocks_of(width, n), rows = kVectors / vectors > 0 ? kVectors / vectors : 1;
  const mask<C> last = first_lanes<C>(width - (vectors - 1) * n);
  // Rows of g whose last vector does not read what the plane has beyond the row: it may be infinite.
  auto sum = [&](int64_t first, int64_t end, auto* runs, auto tap_at, int64_t count, vec<C>* bias) {
    for (int64_t r = first; r < end; ++r) {
      for (int64_t v = 0; v < vectors; ++v) {
        const C* from = plane + r * columns + v * n;
        const vec<C> grads = load_upto(g + r * width + v * n, width - v * n);
        if (bias != nullptr) *bias += grads;
        const bool cut = v + 1 == vectors;
        for (int64_t t = 0; t < count; ++t) {
          const vec<C> read = load(from + tap_at(t));
          runs[t] += grads * (cut ? (last ? read : vec<C>{}) : read);
        }
      }
    }
  };
  for (int64_t r = 0; r < height; r += rows) {
    const int64_t end = least(r + rows, height);
    vec<C> bias{};
    if constexpr (kTaps == 0) {
      for (int64_t t = 0; t < taps.count; ++t) {
        vec<C> run[1] = {};
        sum(r, end, run, [&](int64_t) { return taps.at<0>(t); }, 1, t == 0 ? &bias : nullptr);
        grad[t] += sum_lanes<C>(run[0]);
      }
    } else {
      vec<C> runs[kTaps] = {};
      sum(r, end, runs, [&](int64_t t) { return taps.at<kTaps>(t); }, kTaps, &bias);
      for (int64_t t = 0; t < kTaps; ++t) grad[t] += sum_lanes<C>(runs[t]);
    }
    *grad_bias += sum_lanes<C>(bias);
  }
}

template <class T, int kTaps>
void backward(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  Plane<C> x(args.height, args.width, args.padding_h, args.padding_w);
  // Padded so that the gradient of x is a convolution, too, with the taps in reversed order.
  Plane<C> g(args.out_height, args.out_width, args.dilation_h * (args.kernel_h - 1) - args.padding_h,
             args.dilation_w * (args.kernel_w - 1) - args.padding_w);
  const Taps x_taps(args, x.columns), g_taps(args, g.columns);
  const int64_t count = x_taps.count;
  Buffer<C> kernel(round_up(kChannels * count, kLanes<C>));
  KernelSums<T> sums(args, kChannels, count);
  Buffer<double> grad(kChannels * count);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t c = task * kChannels, channels = least(kChannels, args.groups - c);
    sums.start(c, channels);
    for (int64_t b = 0; b < args.batch; ++b) {
      mix<1, T>(args, b, 1, c, channels, count, static_cast<C*>(kernel));
      memset(grad, 0, sums.size * sizeof(double));
      memset(sums.grad_bias, 0, sums.rows * sizeof(double));
      for (int64_t i = 0; i < channels; ++i) {
        const T* grad_y = args.grad_y.as<const T>().at(b, c + i, 0);
        x.fill(args.x.as<const T>().at(b, c + i, 0));
        g.fill(grad_y);
        convolve<kTaps>(static_cast<const C*>(g.data), g.columns, g_taps, kernel + (i + 1) * count - 1, -1,
                        C(0), args.grad_x.as<T>().at(b, c + i, 0), args.height, args.width);
        correlate<kTaps>(static_cast<const C*>(x.data), x.columns, x_taps, grad_y, args.out_height,
                         args.out_width, grad + i * count, sums.grad_bias + i);
      }
      for (int64_t i = 0; i < sums.size; ++i) sums.grad[i] = static_cast<C>(grad[i]);
      sums.end_sample(b, task);
    }
    sums.write();
  }
}

template <class F>
MFK_INLINE void with_taps(const DynamicConvArgs& args, F f) {
  if (args.kernel_h == 3 && args.kernel_w == 3) {
    f(std::integral_constant<int, 9>());
  } else {
    f(std::integral_constant<int, 0>());
  }
}

}  // namespace

void dynamic_depthwise_forward(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) {
    with_taps(args, [&](auto taps) { forward<decltype(element), decltype(taps)::value>(args, begin, end); });
  });
}

void dynamic_depthwise_backward(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) {
    with_taps(args, [&](auto taps) { backward<decltype(element), decltype(taps)::value>(args, begin, end); });
  });
}

}  // namespace MFK_ISA
}  // namespace mfk
