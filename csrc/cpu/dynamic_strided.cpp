// Depthwise dynamic convolutions with any stride, padding and dilation: pixels of a channel in the lanes, one
// channel's planes at a time.
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

// The outputs of a channel with what lies between their rows.
template <class C>
void convolve(Channel<C>& x, const C* weights, C bias, C* out) {
  constexpr int64_t n = kLanes<C>;
  auto vectors = [&](auto count, int64_t p) __attribute__((always_inline)) {
    constexpr int most = decltype(count)::value;
    vec<C> sums[most];
    for (int v = 0; v < most; ++v) sums[v] = splat(bias);
    for (int64_t t = 0; t < x.taps; ++t) {
      const C* from = x.planes + x.places[t] + p;
      const vec<C> weight = splat(weights[t]);
      for (int v = 0; v < most; ++v) sums[v] += weight * load(from + v * n);
    }
    for (int v = 0; v < most; ++v) store(out + p + v * n, sums[v]);
  };
  int64_t p = 0;
  for (; p + 4 * n <= x.run; p += 4 * n) vectors(std::integral_constant<int, 4>(), p);
  for (; p < x.run; p += n) vectors(std::integral_constant<int, 1>(), p);
}

template <class T>
void forward(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  Channel<C> x(args);
  Buffer<C> kernel(round_up(kChannels * x.taps, kLanes<C>)), out(x.run + kLanes<C>);
  const int64_t blocks = blocks_of(args.groups, kChannels);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / blocks, first = task % blocks * kChannels;
    const int64_t channels = least(kChannels, args.groups - first);
    mix<1, T>(args, b, 1, first, channels, x.taps, static_cast<C*>(kernel));
    for (int64_t i = 0; i < channels; ++i) {
      x.fill(args.x.as<const T>().at(b, first + i, 0));
      convolve<C>(x, kernel + i * x.taps, mixed_bias<T, C>(args, b, first + i), out);
      T* y = args.y.as<T>().at(b, first + i, 0);
      for (int64_t r = 0; r < args.out_height; ++r) {
        const C* from = out + r * x.shape.columns;
        for (int64_t c = 0; c < args.out_width; c += kLanes<C>) {
          store_upto(y + r * args.out_width + c, load(from + c), args.out_width - c);
        }
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
