// Dynamic convolutions with 1x1 kernels: products of mixed kernels with the map as it lies, pixels in the
// lanes.
#include "dynamic_kernels.h"
#include "tile_gemm.h"

namespace mfk {
namespace MFK_ISA {
namespace {

constexpr int64_t kSamples = kPointwiseSamples;

// Blocks of kRows rows by kVectors vectors of pixels: what the registers hold, and few enough rows that none
// of them has to be copied elsewhere to be read fast.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
constexpr int kVectors = 3;

// out[i][p] = start_i + sum_j a(i, j) b[j][p] for some rows and vectors of pixels, of the last of which only
// `rest` lanes exist. No more than kChain products are summed at a time: long chains gather rounding errors.
template <int kChain, int kRows, int kVectors, bool kWhole, class T, class C>
MFK_INLINE void block(T* out, int64_t out_stride, const C* starts, Matrix<C> a, int64_t depth, const T* b,
                      int64_t b_stride, int64_t rest) {
  constexpr int n = kLanes<C>;
  vec<C> total[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) total[r][v] = starts == nullptr ? vec<C>{} : splat(starts[r]);
  }
  for (int64_t j = 0; j < depth;) {
    const int64_t end = j + kChain < depth ? j + kChain : depth;
    vec<C> sums[kRows][kVectors] = {};
    for (; j < end; ++j) {
      vec<C> column[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const T* from = b + j * b_stride + v * n;
        column[v] = kWhole || v + 1 < kVectors ? load(from) : load_upto(from, rest);
      }
      for (int r = 0; r < kRows; ++r) {
        const vec<C> factor = splat(a.data[r * a.row + j * a.column]);
        for (int v = 0; v < kVectors; ++v) sums[r][v] += factor * column[v];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) total[r][v] += sums[r][v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      T* to = out + r * out_stride + v * n;
      kWhole || v + 1 < kVectors ? store(to, total[r][v]) : store_upto(to, total[r][v], rest);
    }
  }
}

template <int kChain, int kVectors, bool kWhole, class T, class C>
MFK_INLINE void block_rows(T* out, int64_t out_stride, const C* starts, int64_t rows, Matrix<C> a,
                           int64_t depth, const T* b, int64_t b_stride, int64_t rest) {
  int64_t i = 0;
  auto some = [&](auto count) __attribute__((always_inline)) {
    constexpr int r = decltype(count)::value;
    for (; rows - i >= r; i += r) {
      block<kChain, r, kVectors, kWhole>(
          out + i * out_stride, out_stride, starts == nullptr ? nullptr : starts + i,
          Matrix<C>{a.data + i * a.row, a.row, a.column}, depth, b, b_stride, rest);
    }
  };
  some(std::integral_constant<int, kRows>());
  if (kRows > 4) some(std::integral_constant<int, 4>());
  some(std::integral_constant<int, 1>());
}

// The same for a few pixels, which would leave most lanes of a vector empty: inputs in the lanes. The rows of
// `a` lie in one piece.
template <int kPixels, class T, class C>
void few_pixels(T* out, int64_t out_stride, const C* starts, int64_t rows, Matrix<C> a, int64_t depth,
                const T* b, int64_t b_stride) {
  Buffer<C> columns(kPixels * depth);
  for (int64_t j = 0; j < depth; ++j) {
    for (int p = 0; p < kPixels; ++p) columns[p * depth + j] = to_compute(b[j * b_stride + p]);
  }
  for (int64_t i = 0; i < rows; ++i) {
    vec<C> sums[kPixels] = {};
    for (int64_t j = 0; j < depth; j += kLanes<C>) {
      const vec<C> factors = load_upto(a.data + i * a.row + j, depth - j);
      for (int p = 0; p < kPixels; ++p) sums[p] += factors * load_upto(columns + p * depth + j, depth - j);
    }
    for (int p = 0; p < kPixels; ++p) {
      const double sum = sum_lanes<C>(sums[p]) + (starts == nullptr ? 0 : starts[i]);
      store_scalar(out + i * out_stride + p, static_cast<C>(sum));
    }
  }
}

// A block of pixels is multiplied by all rows before the next one.
template <int kChain, class T, class C>
void multiply(T* out, int64_t out_stride, const C* starts, int64_t rows, Matrix<C> a, int64_t depth,
              const T* b, int64_t b_stride, int64_t width) {
  constexpr int64_t n = kLanes<C>, whole = kVectors * n, most = n / 4;
  int64_t p = 0;
  for (; width - p >= whole; p += whole) {
    block_rows<kChain, kVectors, true>(out + p, out_stride, starts, rows, a, depth, b + p, b_stride, n);
  }
  const int64_t few = a.column == 1 && (width - p) % n <= most ? (width - p) % n : 0;
  if (p < width - few) {
    with_constant<kVectors>(blocks_of(width - few - p, n), [&](auto vectors) {
      constexpr int v = decltype(vectors)::value;
      block_rows<kChain, v, false>(out + p, out_stride, starts, rows, a, depth, b + p, b_stride,
                                   width - few - p - (v - 1) * n);
    });
  }
  p = width - few;
  with_constant<most>(few, [&](auto pixels) {
    few_pixels<decltype(pixels)::value>(out + p, out_stride, starts, rows, a, depth, b + p, b_stride);
  });
}

// The kernels of some outputs for some samples: mixed, or the weights themselves where there is no basis.
template <class T>
class Kernels {
 public:
  using C = compute_t<T>;
  Kernels(const DynamicConvArgs& args, int64_t most)
      : args_(args),
        plain_(args.kernels == 0 && sizeof(T) == sizeof(C)),
        mixed_(plain_ ? 0 : kSamples * most) {}
  void take(int64_t b, int64_t samples, int64_t first, int64_t outputs, int64_t depth) {
    if (plain_) {
      data_ = static_cast<const C*>(args_.weight) + first * depth;
      return;
    }
    mix<kSamples, T>(args_, b, samples, first, outputs, depth, static_cast<C*>(mixed_));
    data_ = mixed_;
    size_ = outputs * depth;
  }
  const C* of(int64_t sample) const { return data_ + sample * size_; }

 private:
  const DynamicConvArgs& args_;
  const bool plain_;
  Buffer<C> mixed_;
  const C* data_ = nullptr;
  int64_t size_ = 0;
};

template <class T>
void forward(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t depth = args.inputs, pixels = args.height * args.width;
  const int64_t blocks = blocks_of(args.outputs, args.out_block), parts = blocks_of(pixels, args.pixel_block);
  Kernels<T> kernels(args, args.out_block * depth);
  Buffer<C> starts(args.out_block);
  const auto x = args.x.as<const T>();
  const auto y = args.y.as<T>();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t p = task % parts * args.pixel_block, o = task / parts % blocks * args.out_block;
    const int64_t outer = task / parts / blocks;
    const int64_t g = outer % args.groups, b = outer / args.groups * kSamples;
    const int64_t samples = least(kSamples, args.batch - b),
                  outputs = least(args.out_block, args.outputs - o);
    const int64_t first = g * args.outputs + o;
    kernels.take(b, samples, first, outputs, depth);
    for (int64_t s = 0; s < samples; ++s) {
      for (int64_t i = 0; i < outputs; ++i) starts[i] = mixed_bias<T, C>(args, b + s, first + i);
      multiply<256, T, C>(y.at(b + s, first, p), y.stride_c, starts, outputs,
                          Matrix<C>{kernels.of(s), depth, 1}, depth, x.at(b + s, g * depth, p), x.stride_c,
                          least(args.pixel_block, pixels - p));
    }
  }
}

template <class T>
void backward_x(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t depth = args.inputs, pixels = args.height * args.width;
  const int64_t blocks = blocks_of(args.inputs, args.in_block), parts = blocks_of(pixels, args.pixel_block);
  Kernels<T> kernels(args, args.outputs * depth);
  const auto grad_x = args.grad_x.as<T>();
  const auto grad_y = args.grad_y.as<const T>();
  int64_t taken = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t p = task % parts * args.pixel_block, i = task / parts % blocks * args.in_block;
    const int64_t outer = task / parts / blocks;
    const int64_t g = outer % args.groups, b = outer / args.groups * kSamples;
    const int64_t samples = least(kSamples, args.batch - b), inputs = least(args.in_block, args.inputs - i);
    if (outer != taken) kernels.take(b, samples, g * args.outputs, args.outputs, depth);
    taken = outer;
    for (int64_t s = 0; s < samples; ++s) {
      multiply<256, T, C>(grad_x.at(b + s, g * depth + i, p), grad_x.stride_c, nullptr, inputs,
                          Matrix<C>{kernels.of(s) + i, 1, depth}, args.outputs,
                          grad_y.at(b + s, g * args.outputs, p), grad_y.stride_c,
                          least(args.pixel_block, pixels - p));
    }
  }
}

template <class T>
void backward_weight(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t depth = args.inputs, pixels = args.height * args.width;
  const int64_t blocks = blocks_of(args.outputs, args.out_block);
  Buffer<C> pixel_rows(pixels * round_up(depth, kLanes<C>));
  Buffer<C> wide(sizeof(T) == sizeof(C) ? 0 : args.out_block * round_up(pixels, kLanes<C>));
  const auto x = args.x.as<const T>(), grad_y = args.grad_y.as<const T>();
  // The map with channels and pixels exchanged: as a tile, pixels down the rows.
  const FeatureMap<const T> turned{x.data, x.stride_b, x.stride_p, x.stride_c};
  KernelSums<T> sums(args, args.out_block, depth);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t o = task % blocks * args.out_block, g = task / blocks;
    const int64_t outputs = least(args.out_block, args.outputs - o), first = g * args.outputs + o;
    sums.start(first, outputs);
    for (int64_t b = 0; b < args.batch; ++b) {
      const Tile<C> right = load_tile<T>(turned, b, 0, pixels, g * depth, depth, pixel_rows);
      Tile<C> left;
      if constexpr (sizeof(T) == sizeof(C)) {
        left = {grad_y.at(b, first, 0), grad_y.stride_c};
      } else {
        left = load_tile<T>(grad_y, b, first, outputs, 0, pixels, wide);
      }
      multiply<32, C, C>(sums.grad, depth, nullptr, outputs, Matrix<C>{left.data, left.stride, 1}, pixels,
                         right.data, right.stride, depth);
      for (int64_t i = 0; sums.biased && i < outputs; ++i) {
        WideSum<C> sum;
        const T* row = grad_y.at(b, first + i, 0);
        for (int64_t p = 0; p < pixels; p += kLanes<C>) sum.add(load_upto(row + p, pixels - p));
        sums.grad_bias[i] = sum_lanes<C>(sum);
      }
      sums.end_sample(b, task);
    }
    sums.write();
  }
}

}  // namespace

void dynamic_pointwise_forward(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) { forward<decltype(element)>(args, begin, end); });
}

void dynamic_pointwise_backward_x(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) { backward_x<decltype(element)>(args, begin, end); });
}

void dynamic_pointwise_backward_weight(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) { backward_weight<decltype(element)>(args, begin, end); });
}

}  // namespace MFK_ISA
}  // namespace mfk
