// Depthwise dynamic convolutions with stride 1, pixels of a channel in the lanes: a padded plane of each
// channel, of which every tap reads whole vectors. Of square kernels of 3, 5 and 7 a vector that was read
// serves all taps of its column; reading is what takes the time, since most vectors lie across two lines of
// the cache.
#include "dynamic_kernels.h"

namespace mfk {
namespace MFK_ISA {
namespace {

// Channels of a task: their kernels are mixed together.
constexpr int64_t kChannels = kDepthwiseChannels;
// So many vectors are summed in the compute type before the sum goes into a double.
constexpr int64_t kVectors = 64;
// Rows of the output that square kernels make at a time.
constexpr int kRows = 7;

// A channel's map with zeros around it.
template <class C>
struct Plane {
  const int64_t height, width, top, left, columns;
  Buffer<C> data;

  Plane(int64_t h, int64_t w, int64_t padding_h, int64_t padding_w)
      : height(h), width(w), top(padding_h), left(padding_w), columns(w + 2 * padding_w), data(size()) {
    memset(data, 0, size() * sizeof(C));
  }
  // Square kernels read rows for outputs that are not there.
  int64_t size() const { return (height + 2 * top + kRows) * columns + 2 * kLanes<C>; }
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
  int64_t at(int64_t tap) const { return tap / width * down + tap % width * right; }
};

// kRows vectors of the output below one another, of a kernel of kSide x kSide.
template <int kSide, class C>
MFK_INLINE void convolve_column(const C* from, int64_t columns, const C* weights, C bias,
                                vec<C> (&sums)[kRows]) {
  for (int r = 0; r < kRows; ++r) sums[r] = splat(bias);
  unrolled<kRows + kSide - 1>([&](auto row) __attribute__((always_inline)) {
    constexpr int y = decltype(row)::value;
    vec<C> read[kSide];
    unrolled<kSide>([&](auto kx)
                        __attribute__((always_inline)) { read[kx] = load(from + y * columns + kx); });
    unrolled<kRows>([&](auto output) __attribute__((always_inline)) {
      constexpr int r = decltype(output)::value, ky = y - r;
      if constexpr (ky >= 0 && ky < kSide) {
        unrolled<kSide>(
            [&](auto kx) __attribute__((always_inline)) { sums[r] += weights[ky * kSide + kx] * read[kx]; });
      }
    });
  });
}

// With kSide = 0 of any kernel. The taps' weights are read in steps of `step`.
template <int kSide, class T, class C>
void convolve(const C* plane, int64_t columns, const Taps& taps, const C* weights, int64_t step, C bias,
              T* out, int64_t height, int64_t width) {
  constexpr int64_t n = kLanes<C>;
  if constexpr (kSide > 0) {
    C own[kSide * kSide];
    for (int64_t t = 0; t < kSide * kSide; ++t) own[t] = weights[t * step];
    for (int64_t r = 0; r < height; r += kRows) {
      for (int64_t c = 0; c < width; c += n) {
        vec<C> sums[kRows];
        convolve_column<kSide, C>(plane + r * columns + c, columns, own, bias, sums);
        for (int64_t i = 0; i < kRows && r + i < height; ++i) {
          store_upto(out + (r + i) * width + c, sums[i], width - c);
        }
      }
    }
    return;
  }
  for (int64_t r = 0; r < height; ++r) {
    for (int64_t c = 0; c < width; c += n) {
      const C* from = plane + r * columns + c;
      vec<C> sum = splat(bias);
      for (int64_t t = 0; t < taps.count; ++t) sum += weights[t * step] * load(from + taps.at(t));
      store_upto(out + r * width + c, sum, width - c);
    }
  }
}

template <class T, int kSide>
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
      convolve<kSide>(static_cast<const C*>(plane.data), plane.columns, taps, kernel + i * taps.count, 1,
                      mixed_bias<T, C>(args, b, c + i), args.y.as<T>().at(b, c + i, 0), args.out_height,
                      args.out_width);
    }
  }
}

// grad[tap] += sum of g and what the tap read, for kCount rows of taps of a kernel of kSide x kSide, over
// rows first to end-1 of g and one column of vectors, of which `lanes` are in the map.
template <int kSide, int kCount, class T, class C>
MFK_INLINE void correlate_column(const C* from, int64_t columns, const T* g, int64_t width, int64_t first,
                                 int64_t end, int64_t lanes, double* grad) {
  constexpr int64_t n = kLanes<C>;
  const mask<C> inside = first_lanes<C>(lanes);
  vec<C> runs[kCount][kSide] = {}, grads[kCount] = {};
  for (int64_t y = first; y < end + kCount - 1; ++y) {
    // Those of the rows that read this one, the nearest first.
    for (int k = kCount - 1; k > 0; --k) grads[k] = grads[k - 1];
    if (y < end) grads[0] = load_upto(g + y * width, lanes);
    auto add = [&](auto all) __attribute__((always_inline)) {
      unrolled<kSide>([&](auto kx) __attribute__((always_inline)) {
        vec<C> read = load(from + y * columns + kx);
        if (lanes < n) read = inside ? read : vec<C>{};  // what the plane has beyond the row may be infinite
        unrolled<kCount>([&](auto k) __attribute__((always_inline)) {
          if (decltype(all)::value || (y - k >= first && y - k < end)) runs[k][kx] += grads[k] * read;
        });
      });
    };
    if (y - (kCount - 1) >= first && y < end) {
      add(std::true_type());
    } else {
      add(std::false_type());
    }
  }
  for (int k = 0; k < kCount; ++k) {
    for (int kx = 0; kx < kSide; ++kx) grad[k * kSide + kx] += sum_lanes<C>(runs[k][kx]);
  }
}

// grad[tap] += sum of g and what the tap read, grad_bias += sum of g.
template <int kSide, class T, class C>
void correlate(const C* plane, int64_t columns, const Taps& taps, const T* g, int64_t height, int64_t width,
               double* grad, double* grad_bias) {
  constexpr int64_t n = kLanes<C>;
  const int64_t vectors = blocks_of(width, n), rows = kVectors / vectors > 0 ? kVectors / vectors : 1;
  const mask<C> last = first_lanes<C>(width - (vectors - 1) * n);
  for (int64_t r = 0; r < height; r += rows) {
    const int64_t end = least(r + rows, height);
    vec<C> bias{};
    for (int64_t y = r; y < end; ++y) {
      for (int64_t c = 0; c < width; c += n) bias += load_upto(g + y * width + c, width - c);
    }
    *grad_bias += sum_lanes<C>(bias);
    if constexpr (kSide > 0) {
      double sums[kSide * kSide] = {};
      for (int64_t c = 0; c < width; c += n) {
        const C* from = plane + c;
        // As many rows of taps at a time as registers hold sums for.
        unrolled<(kSide + 2) / 3>([&](auto block) __attribute__((always_inline)) {
          constexpr int k = decltype(block)::value * 3, count = kSide - k < 3 ? kSide - k : 3;
          correlate_column<kSide, count, T, C>(from + k * columns, columns, g + c, width, r, end, width - c,
                                               sums + k * kSide);
        });
      }
      for (int t = 0; t < kSide * kSide; ++t) grad[t] += sums[t];
    } else {
      for (int64_t t = 0; t < taps.count; ++t) {
        vec<C> run{};
        for (int64_t y = r; y < end; ++y) {
          for (int64_t v = 0; v < vectors; ++v) {
            const vec<C> read = load(plane + y * columns + v * n + taps.at(t));
            const vec<C> grads = load_upto(g + y * width + v * n, width - v * n);
            run += grads * (v + 1 == vectors ? (last ? read : vec<C>{}) : read);
          }
        }
        grad[t] += sum_lanes<C>(run);
      }
    }
  }
}

template <class T, int kSide>
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
        convolve<kSide>(static_cast<const C*>(g.data), g.columns, g_taps, kernel + (i + 1) * count - 1, -1,
                        C(0), args.grad_x.as<T>().at(b, c + i, 0), args.height, args.width);
        correlate<kSide>(static_cast<const C*>(x.data), x.columns, x_taps, grad_y, args.out_height,
                         args.out_width, grad + i * count, sums.grad_bias + i);
      }
      for (int64_t i = 0; i < sums.size; ++i) sums.grad[i] = static_cast<C>(grad[i]);
      sums.end_sample(b, task);
    }
    sums.write();
  }
}

template <class F>
MFK_INLINE void with_side(const DynamicConvArgs& args, F f) {
  const bool square = args.kernel_h == args.kernel_w && args.dilation_h == 1 && args.dilation_w == 1;
  switch (square ? args.kernel_h : 0) {
    case 3:
      return f(std::integral_constant<int, 3>());
    case 5:
      return f(std::integral_constant<int, 5>());
    case 7:
      return f(std::integral_constant<int, 7>());
    default:
      return f(std::integral_constant<int, 0>());
  }
}

}  // namespace

void dynamic_depthwise_forward(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) {
    with_side(args, [&](auto side) { forward<decltype(element), decltype(side)::value>(args, begin, end); });
  });
}

void dynamic_depthwise_backward(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) {
    with_side(args, [&](auto side) { backward<decltype(element), decltype(side)::value>(args, begin, end); });
  });
}

}  // namespace MFK_ISA
}  // namespace mfk
