// Depthwise dynamic convolutions with any stride, padding and dilation. The backward pass has pixels of a
// channel in the lanes, one channel's planes at a time.
#include "dynamic_planes.h"

namespace mfk {
namespace MFK_ISA {
namespace {

// Channels of a task: their kernels are mixed together.
constexpr int64_t kChannels = kDepthwiseChannels;
// So many vectors are summed in the compute type before the sum goes into a double.
constexpr int64_t kVectors = 64;

// A channel in its planes, and where in them each tap of the first output reads.
template <class C>
struct Channel {
  const Planes shape;
  const int64_t taps, run;
  Buffer<C> planes, row;
  Buffer<int64_t> places;

  explicit Channel(const DynamicConvArgs& args)
      : shape(args, args.out_height),
        taps(args.kernel_h * args.kernel_w),
        run(shape.run<C>()),
        planes(shape.size<C>(1)),
        row(round_up(args.width, kLanes<C>)),
        places(taps) {
    for (int64_t t = 0; t < taps; ++t) places[t] = shape.tap(t / args.kernel_w, t % args.kernel_w);
  }
  template <class T>
  void fill(const T* map) {
    memset(planes, 0, shape.size<C>(1) * sizeof(C));
    const int64_t width = shape.args.width, top = shape.args.padding_h;
    for (int64_t y = 0; y < shape.args.height && y + top < shape.height; ++y) {
      shape.for_columns(y + top, [&](int64_t x, int64_t at, int64_t count) {
        copy_strided(map + y * width + x, shape.args.stride_w, count, planes + at);
      });
    }
  }
  template <class T>
  void spill(int64_t b, int64_t c) {
    shape.spill<T>(b, c, 1, static_cast<const C*>(planes), static_cast<C*>(row));
  }
};

// The forward pass has channels in the lanes: of some rows of the output, the pixels that they read lie side
// by side for as many channels as a vector has lanes, with zeros around the map.
template <class C>
struct Band {
  static constexpr int64_t n = kLanes<C>;
  const DynamicConvArgs& args;
  const int64_t columns, width, rows;  // pixels of a row, and those of the map; rows of the output at a time
  Buffer<C> pixels, out;

  explicit Band(const DynamicConvArgs& a)
      : args(a),
        columns((a.out_width - 1) * a.stride_w + (a.kernel_w - 1) * a.dilation_w + 1),
        width(least(a.width, columns - a.padding_w)),
        rows(most_rows()),
        pixels(height(rows) * columns * n),
        out(rows * a.out_width * n) {}
  int64_t height(int64_t of) const {
    return (of - 1) * args.stride_h + (args.kernel_h - 1) * args.dilation_h + 1;
  }
  // So many that what they read stays in the first-level cache, or twice what the kernel reads.
  int64_t most_rows() const {
    int64_t most = 1;
    while (most < args.out_height &&
           (height(most + 1) * columns * n <= 8192 || height(most) < 2 * height(1))) {
      ++most;
    }
    return most;
  }
  template <class T>
  void fill(int64_t b, int64_t c, int64_t channels, int64_t first, int64_t count) {
    const FeatureMap<const T> x = args.x.as<const T>(), turned{x.data, x.stride_b, x.stride_p, x.stride_c};
    memset(pixels, 0, height(count) * columns * n * sizeof(C));
    const int64_t top = first * args.stride_h - args.padding_h;
    for (int64_t y = top < 0 ? 0 : top; y < args.height && y - top < height(count) && width > 0; ++y) {
      copy_tile<T>(turned, b, y * args.width, width, c, channels,
                   pixels + ((y - top) * columns + args.padding_w) * n, n);
    }
  }
  // `weights` has a vector for each tap.
  void convolve(const C* weights, vec<C> bias, int64_t count) {
    constexpr int kPixels = 8;
    const int64_t right = args.dilation_w * n, step = args.stride_w * n;
    for (int64_t r = 0; r < count; ++r) {
      const C* line = pixels + r * args.stride_h * columns * n;
      C* to = out + r * args.out_width * n;
      for (int64_t first = 0; first < args.out_width; first += kPixels) {
        with_constant<kPixels>(
            least(kPixels, args.out_width - first), [&](auto some) __attribute__((always_inline)) {
              constexpr int most = decltype(some)::value;
              vec<C> sums[most];
              for (int i = 0; i < most; ++i) sums[i] = bias;
              const C* weight = weights;
              for (int64_t ky = 0; ky < args.kernel_h; ++ky) {
                const C* from = line + ky * args.dilation_h * columns * n + first * step;
                for (int64_t kx = 0; kx < args.kernel_w; ++kx, from += right, weight += n) {
                  const vec<C> factor = load(weight);
                  for (int i = 0; i < most; ++i) sums[i] += factor * load(from + i * step);
                }
              }
              for (int i = 0; i < most; ++i) store(to + (first + i) * n, sums[i]);
            });
      }
    }
  }
  template <class T>
  void write(int64_t b, int64_t c, int64_t channels, int64_t first, int64_t count) {
    const FeatureMap<T> y = args.y.as<T>(), turned{y.data, y.stride_b, y.stride_p, y.stride_c};
    store_tile<T>(turned, b, first * args.out_width, count * args.out_width, c, channels,
                  static_cast<const C*>(out), n);
  }
};

template <class T>
void forward(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int64_t n = kLanes<C>;
  const int64_t blocks = blocks_of(args.groups, kChannels), taps = args.kernel_h * args.kernel_w;
  Band<C> band(args);
  Buffer<C> kernel(kChannels * taps), weights(taps * n);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / blocks, first = task % blocks * kChannels;
    const int64_t last = least(first + kChannels, args.groups);
    mix<1, T>(args, b, 1, first, last - first, taps, static_cast<C*>(kernel));
    for (int64_t c = first; c < last; c += n) {
      const int64_t channels = least(n, last - c);
      copy_tile<C>(FeatureMap<const C>{kernel + (c - first) * taps, 0, 1, taps}, 0, 0, taps, 0, channels,
                   static_cast<C*>(weights), n);
      C bias[n] = {};
      for (int64_t i = 0; i < channels; ++i) bias[i] = mixed_bias<T, C>(args, b, c + i);
      for (int64_t r = 0; r < args.out_height; r += band.rows) {
        const int64_t count = least(band.rows, args.out_height - r);
        band.template fill<T>(b, c, channels, r, count);
        band.convolve(weights, load(bias), count);
        band.template write<T>(b, c, channels, r, count);
      }
    }
  }
}

// The gradient of x, in the planes: what each tap read gets its share of the outputs' gradient.
template <class C>
void scatter(Channel<C>& x, const C* weights, const C* g) {
  memset(x.planes, 0, x.shape.template size<C>(1) * sizeof(C));
  for (int64_t first = 0; first < x.run; first += kVectors * kLanes<C>) {
    const int64_t end = least(first + kVectors * kLanes<C>, x.run);
    for (int64_t t = 0; t < x.taps; ++t) {
      C* to = x.planes + x.places[t];
      const vec<C> weight = splat(weights[t]);
      for (int64_t p = first; p < end; p += kLanes<C>) store(to + p, load(to + p) + weight * load(g + p));
    }
  }
}

// grad[tap] += the sum of g and what the tap read; grad_bias += the sum of g.
template <class C>
void correlate(Channel<C>& x, const C* g, double* grad, double* grad_bias) {
  for (int64_t first = 0; first < x.run; first += kVectors * kLanes<C>) {
    const int64_t end = least(first + kVectors * kLanes<C>, x.run);
    vec<C> bias{};
    for (int64_t p = first; p < end; p += kLanes<C>) bias += load(g + p);
    *grad_bias += sum_lanes<C>(bias);
    for (int64_t t = 0; t < x.taps; ++t) {
      const C* read = x.planes + x.places[t];
      vec<C> sum{};
      for (int64_t p = first; p < end; p += kLanes<C>) sum += load(g + p) * load(read + p);
      grad[t] += sum_lanes<C>(sum);
    }
  }
}

template <class T>
void backward(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  Channel<C> x(args);
  Buffer<C> kernel(round_up(kChannels * x.taps, kLanes<C>)), g(x.run),
      scratch(round_up(args.out_height * args.out_width, kLanes<C>));
  KernelSums<T> sums(args, kChannels, x.taps);
  Buffer<double> grad(kChannels * x.taps);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * kChannels, channels = least(kChannels, args.groups - first);
    sums.start(first, channels);
    for (int64_t b = 0; b < args.batch; ++b) {
      mix<1, T>(args, b, 1, first, channels, x.taps, static_cast<C*>(kernel));
      memset(grad, 0, sums.size * sizeof(double));
      memset(sums.grad_bias, 0, sums.rows * sizeof(double));
      for (int64_t i = 0; i < channels; ++i) {
        load_outputs<T>(args, x.shape, b, first + i, 1, 0, static_cast<C*>(g), static_cast<C*>(scratch));
        x.fill(args.x.as<const T>().at(b, first + i, 0));
        correlate<C>(x, g, grad + i * x.taps, sums.grad_bias + i);
        scatter<C>(x, kernel + i * x.taps, g);
        x.template spill<T>(b, first + i);
      }
      for (int64_t i = 0; i < sums.size; ++i) sums.grad[i] = static_cast<C>(grad[i]);
      sums.end_sample(b, task);
    }
    sums.write();
  }
}

}  // namespace

void dynamic_strided_forward(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) { forward<decltype(element)>(args, begin, end); });
}

void dynamic_strided_backward(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) { backward<decltype(element)>(args, begin, end); });
}

}  // namespace MFK_ISA
}  // namespace mfk
