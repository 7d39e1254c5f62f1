// Dynamic convolutions with 1x1 kernels: products of mixed kernels with the map as it lies.
#include "dynamic_kernels.h"
#include "pointwise.h"

namespace mfk {
namespace MFK_ISA {
namespace {

constexpr int64_t kSamples = kPointwiseSamples;

// A bias for each output.
template <class C>
struct AddBias {
  const C* bias;
  struct At {
    vec<C> bias;
    template <class T>
    MFK_INLINE vec<C> operator()(vec<C> y, const T*) const {
      return y + bias;
    }
  };
  MFK_INLINE At at(int64_t o) const { return {splat(bias[o])}; }
};

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
    if (samples == 1) {
      mix<1, T>(args_, b, 1, first, outputs, depth, static_cast<C*>(mixed_));
    } else {
      mix<kSamples, T>(args_, b, samples, first, outputs, depth, static_cast<C*>(mixed_));
    }
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
  Buffer<C> bias(args.out_block);
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
      for (int64_t i = 0; i < outputs; ++i) bias[i] = mixed_bias<T, C>(args, b + s, first + i);
      multiply<256, T, C>(y.at(b + s, first, p), y.stride_c, outputs, Matrix<C>{kernels.of(s), depth, 1},
                          depth, RowsBy<T>{x.at(b + s, g * depth, p), x.stride_c},
                          least(args.pixel_block, pixels - p), AddBias<C>{bias});
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
  // Where all samples share their kernels these are turned once, (inputs, outputs): read down the columns
  // they would lie in few sets of the first-level cache.
  const int64_t across = round_up(args.outputs, kLanes<C>);
  const bool shared = args.kernels == 0;
  Buffer<C> turned(shared ? depth * across : 0);
  int64_t taken = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t p = task % parts * args.pixel_block, i = task / parts % blocks * args.in_block;
    const int64_t outer = task / parts / blocks;
    const int64_t g = outer % args.groups, b = outer / args.groups * kSamples;
    const int64_t samples = least(kSamples, args.batch - b), inputs = least(args.in_block, args.inputs - i);
    const int64_t wanted = shared ? g : outer;
    if (wanted != taken) {
      kernels.take(b, samples, g * args.outputs, args.outputs, depth);
      if (shared) {
        copy_tile<C>(FeatureMap<const C>{kernels.of(0), 0, 1, depth}, 0, 0, depth, 0, args.outputs,
                     static_cast<C*>(turned), across);
      }
    }
    taken = wanted;
    for (int64_t s = 0; s < samples; ++s) {
      const Matrix<C> left =
          shared ? Matrix<C>{turned + i * across, across, 1} : Matrix<C>{kernels.of(s) + i, 1, depth};
      multiply<256, T, C>(grad_x.at(b + s, g * depth + i, p), grad_x.stride_c, inputs, left, args.outputs,
                          RowsBy<T>{grad_y.at(b + s, g * args.outputs, p), grad_y.stride_c},
                          least(args.pixel_block, pixels - p));
    }
  }
}

template <class T>
void backward_weight(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t depth = args.inputs, pixels = args.height * args.width;
  const int64_t blocks = blocks_of(args.outputs, args.out_block);
  // So many pixels at a time that, channels side by side, they stay in the second-level cache, and that few
  // short chains add them up: sums of some of them go into doubles.
  const int64_t fit = 131072 / depth / 32 * 32, part = fit < 128 ? 128 : least(fit, 1024);
  const bool in_parts = pixels > part;
  Buffer<C> pixel_rows(least(part, pixels) * round_up(depth, kLanes<C>));
  Buffer<C> wide(sizeof(T) == sizeof(C) ? 0 : args.out_block * round_up(least(part, pixels), kLanes<C>));
  const auto x = args.x.as<const T>(), grad_y = args.grad_y.as<const T>();
  // The map with channels and pixels exchanged: as a tile, pixels down the rows.
  const FeatureMap<const T> turned{x.data, x.stride_b, x.stride_p, x.stride_c};
  KernelSums<T> sums(args, args.out_block, depth);
  Buffer<double> total(in_parts ? args.out_block * depth : 0);
  // The blocks of outputs of a single sample share its pixels.
  const bool one = args.batch == 1 && !in_parts;
  Tile<C> right{};
  int64_t loaded = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t o = task % blocks * args.out_block, g = task / blocks;
    const int64_t outputs = least(args.out_block, args.outputs - o), first = g * args.outputs + o;
    sums.start(first, outputs);
    for (int64_t b = 0; b < args.batch; ++b) {
      for (int64_t p = 0; p < pixels; p += part) {
        const int64_t count = least(part, pixels - p);
        if (!one || loaded != g) right = load_tile<T>(turned, b, p, count, g * depth, depth, pixel_rows);
        loaded = g;
        Tile<C> left;
        if constexpr (sizeof(T) == sizeof(C)) {
          left = {grad_y.at(b, first, p), grad_y.stride_c};
        } else {
          left = load_tile<T>(grad_y, b, first, outputs, p, count, wide);
        }
        multiply<32, C, C>(sums.grad, depth, outputs, Matrix<C>{left.data, left.stride, 1}, count,
                           RowsBy<C>{right.data, right.stride}, depth);
        for (int64_t i = 0; in_parts && i < sums.size; ++i) {
          total[i] = p == 0 ? sums.grad[i] : total[i] + sums.grad[i];
        }
      }
      for (int64_t i = 0; in_parts && i < sums.size; ++i) sums.grad[i] = static_cast<C>(total[i]);
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
