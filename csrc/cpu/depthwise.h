// Depthwise 3x3 convolution of one row, channels in the lanes, padding 1.
#pragma once

#include "gemm.h"

namespace mfk {
namespace MFK_ISA {

// `count` neighbouring outputs, all their columns inside the image. `rows` point at the first of them.
template <int kOutputs, int kStride, class Epilogue>
MFK_INLINE void depthwise_inside(const float* const (&rows)[3], int64_t pixel, const float* w,
                                 int64_t w_stride, float* out, int64_t out_stride, Epilogue epilogue,
                                 int64_t channels, int64_t o) {
  constexpr int n = kLanes<float>;
  for (int64_t c = 0; c < channels; c += n) {
    vec<float> acc[kOutputs] = {};
    for (int ky = 0; ky < 3; ++ky) {
      vec<float> taps[3];
      for (int kx = 0; kx < 3; ++kx) taps[kx] = load(w + (ky * 3 + kx) * w_stride + c);
      for (int ix = 0; ix < (kOutputs - 1) * kStride + 3; ++ix) {
        const vec<float> x = load(rows[ky] + ix * pixel + c);
        for (int i = 0; i < kOutputs; ++i) {
          const int kx = ix - i * kStride;
          if (kx >= 0 && kx < 3) acc[i] += x * taps[kx];
        }
      }
    }
    const auto finish = epilogue.at(o + c);
    for (int i = 0; i < kOutputs; ++i) store(out + i * out_stride + c, finish(acc[i], 0));
  }
}

// One output at a border: columns x0 to x1-1 of the taps are inside the image.
template <class Epilogue>
MFK_INLINE void depthwise_border(const float* const (&rows)[3], int64_t pixel, int64_t x0, int64_t x1,
                                 const float* w, int64_t w_stride, float* out, Epilogue epilogue,
                                 int64_t channels, int64_t o) {
  constexpr int n = kLanes<float>;
  for (int64_t c = 0; c < channels; c += n) {
    vec<float> acc{};
    for (int ky = 0; ky < 3; ++ky) {
      for (int64_t kx = x0; kx < x1; ++kx) {
        acc += load(rows[ky] + kx * pixel + c) * load(w + (ky * 3 + kx) * w_stride + c);
      }
    }
    store(out + c, epilogue.at(o + c)(acc, 0));
  }
}

// A row of `width_out` outputs from three input rows of `width_in` pixels (a row of zeros where the image
// ends). `channels` channels from the `pixel` floats of a pixel; taps (3, 3, w_stride), outputs
// `out_stride` apart; `o` is the first channel's number in the epilogue.
template <int kStride, class Epilogue>
void depthwise_row(const float* const (&rows)[3], int64_t width_in, int64_t width_out, int64_t pixel,
                   const float* w, int64_t w_stride, float* out, int64_t out_stride, Epilogue epilogue,
                   int64_t channels, int64_t o) {
  constexpr int64_t kOutputs = 4;
  // The outputs whose three columns, from ox * kStride - 1 on, are all inside.
  const int64_t inside_end = width_in >= 2 ? (width_in - 2) / kStride + 1 : 0;
  for (int64_t ox = 0; ox < width_out;) {
    const int64_t left = ox * kStride - 1;
    const float* at[3];
    for (int ky = 0; ky < 3; ++ky) at[ky] = rows[ky] + left * pixel;
    float* to = out + ox * out_stride;
    if (ox >= 1 && ox + kOutputs <= inside_end) {
      depthwise_inside<kOutputs, kStride>(at, pixel, w, w_stride, to, out_stride, epilogue, channels, o);
      ox += kOutputs;
    } else if (ox >= 1 && ox < inside_end) {
      depthwise_inside<1, kStride>(at, pixel, w, w_stride, to, out_stride, epilogue, channels, o);
      ox += 1;
    } else {
      const int64_t x0 = left < 0 ? 1 : 0, x1 = left + 3 > width_in ? width_in - left : 3;
      depthwise_border(at, pixel, x0, x1, w, w_stride, to, epilogue, channels, o);
      ox += 1;
    }
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
