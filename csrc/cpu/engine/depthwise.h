// Depthwise convolution of one row, channels in the lanes; the kernels are odd squares, the padding is half
// of them, or nothing.
#pragma once

#include "../simd/gemm.h"

namespace mfk {
namespace MFK_ISA {

namespace detail {

// kOutputs neighbouring outputs of all channels. `rows` point at the pixel of the first one's left tap.
// kLeft: that pixel is outside of the image, by the whole padding; kRight: the last one's right tap is.
template <int kSize, int kOutputs, int kStride, bool kLeft, bool kRight, class In, class Out, class Epilogue>
void depthwise_run(const In* const (&rows)[kSize], int64_t pixel, const float* w, Out* out, Epilogue epilogue,
                   int64_t channels) {
  constexpr int n = kLanes<float>, kColumns = (kOutputs - 1) * kStride + kSize, kPadding = kSize / 2;
  for (int64_t c = 0, in = 0; c < channels; c += n, in += n) {
    if (in == pixel) in = 0;
    vec<float> acc[kOutputs] = {};
#pragma GCC unroll 3
    for (int ky = 0; ky < kSize; ++ky) {
      vec<float> taps[kSize];
      for (int kx = 0; kx < kSize; ++kx) taps[kx] = load(w + (ky * kSize + kx) * channels + c);
#pragma GCC unroll 17
      for (int column = kLeft ? kPadding : 0; column < kColumns - (kRight ? kPadding : 0); ++column) {
        const vec<float> x = load(rows[ky] + column * pixel + in);
#pragma GCC unroll 7
        for (int i = 0; i < kOutputs; ++i) {
          const int kx = column - i * kStride;
          if (kx >= 0 && kx < kSize) acc[i] += x * taps[kx];
        }
      }
    }
    with_finish(epilogue, c, [&](auto finish) __attribute__((always_inline)) {
      for (int i = 0; i < kOutputs; ++i) store(out + i * channels + c, finish.activate(acc[i] + finish.bias));
    });
  }
}

}  // namespace detail

// A row of `width_out` outputs from kSize input rows of `width_in` pixels (a row of zeros where the image
// ends). Output channel c, of `channels`, comes from input channel c modulo `pixel`; taps (kSize, kSize,
// channels). The first output's left tap is `before` pixels outside of the image. Runs are so long that what
// lies outside of it is the whole padding or nothing; with stride 2 this is so for 3x3 kernels alone, and for
// 5x5 ones where rows have all of their padding in them, which `width_in` counts.
template <int kSize, int kStride, class In, class Out, class Epilogue>
void depthwise_row(const In* const (&rows)[kSize], int64_t width_in, int64_t width_out, int64_t pixel,
                   const float* w, Out* out, Epilogue epilogue, int64_t channels,
                   int64_t before = kSize / 2) {
  static_assert(kStride == 1 || kSize <= 5);
  constexpr int64_t kMost = 7;
  const int64_t runs = (width_out + kMost - 1) / kMost;
  for (int64_t run = 0; run < runs; ++run) {
    // Of nearly equal length.
    const int64_t first = width_out * run / runs, count = width_out * (run + 1) / runs - first;
    const int64_t left = first * kStride - before;
    const bool cut_left = left<0, cut_right = left + (count - 1) * kStride + kSize> width_in;
    const In* at[kSize];
    for (int ky = 0; ky < kSize; ++ky) at[ky] = rows[ky] + left * pixel;
    Out* to = out + first * channels;
    with_constant<kMost>(count, [&](auto outputs) __attribute__((always_inline)) {
      constexpr int n = decltype(outputs)::value;
      auto run_with = [&](auto cuts_left, auto cuts_right) __attribute__((always_inline)) {
        detail::depthwise_run<kSize, n, kStride, decltype(cuts_left)::value, decltype(cuts_right)::value>(
            at, pixel, w, to, epilogue, channels);
      };
      const std::true_type yes;
      const std::false_type no;
      if (cut_left) {
        cut_right ? run_with(yes, yes) : run_with(yes, no);
      } else {
        cut_right ? run_with(no, yes) : run_with(no, no);
      }
    });
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
