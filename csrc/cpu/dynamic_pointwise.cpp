// Dynamic convolutions with 1x1 kernels: products of mixed kernels with the map as it lies, pixels in the
// lanes.
#include "dynamic_kernels.h"
#include "tile_gemm.h"

namespace mfk {
namespace MFK_ISA {
namespace {

constexpr int64_t kSamples = kPointwiseSamples;

// out[i][p] = start_i + sum_j a(i, j) b[j][p] for kRows rows and kVectors vectors of pixels, of the last of
// which only `rest` lanes exist. No more than kChain products are summed at a time: long chains gather
// rounding errors.
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
        column[v] = kWhole || v + 1 < kVectors ? load(from) : load_part(from, rest);
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
      kWhole || v + 1 < kVectors ? store(to, total[r][v]) : store_part(to, total[r][v], rest);
    }
  }
}

template <int kChain, class T, class C>
void multiply(T* out, int64_t out_stride, const C* starts, int64_t rows, Matrix<C> a, int64_t depth,
              const T* b, int64_t b_stride, int64_t width) {
  constexpr int64_t n = kLanes<C>;
  auto columns = [&](auto block_rows, int64_t i, int64_t begin, int64_t end) {
    constexpr int r = decltype(block_rows)::value;
    const C* first = starts == nullptr ? nullptr : starts + i;
    const Matrix<C> left{a.data + i * a.row, a.row, a.column};
    for (int64_t p = begin; p < end; p += 2 * n) {
      T* to = out + i * out_stride + p;
      const int64_t here = width - p;
      if (here >= 2 * n) {
        block<kChain, r, 2, true>(to, out_stride, first, left, depth, b + p, b_stride, n);
      } else if (here > n) {
        block<kChain, r, 2, false>(to, out_stride, first, left, depth, b + p, b_stride, here - n);
      } else if (here == n) {
        block<kChain, r, 1, true>(to, out_stride, first, left, depth, b + p, b_stride, n);
      } else {
        block<kChain, r, 1, false>(to, out_stride, first, left, depth, b + p, b_stride, here);
      }
    }
  };
  // So many columns of b at a time that they stay in the first-level cache.
  const int64_t fit = (6144 / depth < 2 * n ? 2 * n : 6144 / depth / (2 * n) * 2 * n);
  for (int64_t p = 0; p < width; p += fit) {
    const int64_t end = least(p + fit, width);
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; rows - i >= 12; i += 12) columns(std::integral_constant<int, 12>(), i, p, end);
#endif
    for (; rows - i >= 6; i += 6) columns(std::integral_constant<int, 6>(), i, p, end);
    for (; rows - i >= 3; i += 3) columns(std::integral_constant<int, 3>(), i, p, end);
    for (; rows - i >= 1; i += 1) columns(std::integral_constant<int, 1>(), i, p, end);
  }
}

template <class T>
void forward(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t depth = args.inputs, pixels = args.height * args.width;
  const int64_t blocks = blocks_of(args.outputs, args.out_block);
  Buffer<C> kernels(kSamples * args.out_block * depth), starts(args.out_block);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t o = task % blocks * args.out_block, g = task / blocks % args.groups;
    const int64_t b = task / blocks / args.groups * kSamples;
    const int64_t samples = least(kSamples, args.batch - b),
                  outputs = least(args.out_block, args.outputs - o);
    const int64_t first = g * args.outputs + o;
    mix<kSamples, T>(args, b, samples, first, outputs, depth, static_cast<C*>(kernels));
    for (int64_t s = 0; s < samples; ++s) {
      for (int64_t i = 0; i < outputs; ++i) starts[i] = mixed_bias<T, C>(args, b + s, first + i);
      const auto x = args.x.as<const T>();
      const auto y = args.y.as<T>();
      multiply<256, T, C>(y.at(b + s, first, 0), y.stride_c, starts, outputs,
                          Matrix<C>{kernels + s * outputs * depth, depth, 1}, depth,
                          x.at(b + s, g * depth, 0), x.stride_c, pixels);
    }
  }
}

template <class T>
void backward_x(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t depth = args.inputs, pixels = args.height * args.width, size = args.outputs * depth;
  const int64_t blocks = blocks_of(args.inputs, args.in_block);
  Buffer<C> kernels(kSamples * size);
  int64_t mixed = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t i = task % blocks * args.in_block, outer = task / blocks;
    const int64_t g = outer % args.groups, b = outer / args.groups * kSamples;
    const int64_t samples = least(kSamples, args.batch - b), inputs = least(args.in_block, args.inputs - i);
    if (outer != mixed) {
      mix<kSamples, T>(args, b, samples, g * args.outputs, args.outputs, depth, static_cast<C*>(kernels));
    }
    mixed = outer;
    for (int64_t s = 0; s < samples; ++s) {
      const auto grad_x = args.grad_x.as<T>();
      const auto grad_y = args.grad_y.as<const T>();
      multiply<256, T, C>(grad_x.at(b + s, g * depth + i, 0), grad_x.stride_c, nullptr, inputs,
                          Matrix<C>{kernels + s * size + i, 1, depth}, args.outputs,
                          grad_y.at(b + s, g * args.outputs, 0), grad_y.stride_c, pixels);
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
