#include "pointwise_conv_bn.h"

#include "../simd/elementary.h"
#include "../simd/tile.h"
#include "pointwise.h"

namespace mfk {
namespace MFK_ISA {
namespace {

// The mean is subtracted first: where it is large beside the deviation, a product with the sum itself would
// be rounded to fewer digits.
template <class C, bool kGelu>
struct Normalize {
  const C *mean, *factor, *bias;
  struct At {
    vec<C> mean, factor, bias;
    template <class T>
    MFK_INLINE vec<C> operator()(vec<C> sum, const T*) const {
      const vec<C> y = (sum - mean) * factor + bias;
      return kGelu ? strict_gelu(y) : y;
    }
  };
  MFK_INLINE At at(int64_t o) const { return {splat(mean[o]), splat(factor[o]), splat(bias[o])}; }
};

template <class T, bool kGelu>
void forward(const PointwiseConvBnArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const auto x = args.x.as<const T>();
  const auto y = args.y.as<T>();
  const int64_t parts = blocks_of(args.pixels, kPointwisePixels);
  const Matrix<C> weight{static_cast<const C*>(args.weight), args.inputs, 1};
  Buffer<C> numbers(3 * args.outputs);
  C *mean = numbers, *factor = mean + args.outputs, *bias = factor + args.outputs;
  for (int64_t o = 0; o < args.outputs; ++o) {
    mean[o] = static_cast<C>(args.mean[o]);
    factor[o] = static_cast<C>(args.factor[o]);
    bias[o] = static_cast<C>(args.bias[o]);
  }
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / parts, p = task % parts * kPointwisePixels, rest = args.pixels - p;
    multiply<256, T, C>(
        y.at(b, 0, p), y.stride_c, args.outputs, weight, args.inputs, RowsBy<T>{x.at(b, 0, p), x.stride_c},
        rest < kPointwisePixels ? rest : kPointwisePixels, Normalize<C, kGelu>{mean, factor, bias});
  }
}

}  // namespace

void pointwise_conv_bn(const PointwiseConvBnArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    args.gelu ? forward<T, true>(args, begin, end) : forward<T, false>(args, begin, end);
  });
}

}  // namespace MFK_ISA
}  // namespace mfk
