// Rows of maps on their way through a deployed network.
#pragma once

#include "../simd/gemm.h"
#include "images.h"

namespace mfk {

namespace MFK_ISA {

// Line y of a sample, channels last; zeros above and below the image.
inline void image_line(const Images& images, int64_t channels, int64_t b, int64_t y, Stored* to) {
  if (y < 0 || y >= images.height) {
    memset(to, 0, images.width * channels * sizeof(Stored));
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    const float* from = images.data + b * images.stride_b + c * images.stride_c + y * images.stride_h;
    for (int64_t x = 0; x < images.width; ++x) store_scalar(to + x * channels + c, from[x * images.stride_w]);
  }
}

// Rows of an intermediate map, kept from task to task: those that the next task needs, too, move to the
// front.
struct Ring {
  float* data;
  const float* zeros;
  int64_t row, height;         // floats of a row; rows of the whole map
  int64_t first = 0, end = 0;  // those that are there

  // Makes place for rows `from` to `to`-1; `make(data, y0, y1)` writes those that are not there yet.
  template <class F>
  void provide(int64_t from, int64_t to, F make) {
    from = from < 0 ? 0 : from;
    to = to < height ? to : height;
    if (from >= end || from < first) {
      first = end = from;
    } else if (from > first) {
      memmove(data, data + (from - first) * row, (end - from) * row * sizeof(float));
      first = from;
    }
    if (end < to) make(data + (end - first) * row, end, to);
    end = to > end ? to : end;
  }
  const float* at(int64_t y) const { return y < 0 || y >= height ? zeros : data + (y - first) * row; }
};

}  // namespace MFK_ISA
}  // namespace mfk
