// A map of a convolution with any stride, padding and dilation, in working memory.
#pragma once

#include "../simd/tile.h"
#include "dynamic_kernels.h"

namespace mfk {
namespace MFK_ISA {

namespace detail {

template <class C, size_t... kLane>
MFK_INLINE vec<C> even_lanes(vec<C> a, vec<C> b, std::index_sequence<kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (2 * kLane)...);
#else
  return __builtin_shuffle(a, b, mask<C>{static_cast<typename IntegerOf<C>::type>(2 * kLane)...});
#endif
}

}  // namespace detail

// to[j] = from[j * stride] for j < count
template <class T>
MFK_INLINE void copy_strided(const T* from, int64_t stride, int64_t count, compute_t<T>* to) {
  using C = compute_t<T>;
  constexpr int64_t n = kLanes<C>;
  if (stride > 2) {
    for (int64_t j = 0; j < count; ++j) to[j] = to_compute(from[j * stride]);
    return;
  }
  for (int64_t j = 0; j < count; j += n) {
    vec<C> some;
    if (stride == 1) {
      some = load_upto(from + j, count - j);
    } else {
      const int64_t rest = 2 * (count - j) - 1;
      const vec<C> low = load_upto(from + 2 * j, rest),
                   high = rest > n ? load_upto(from + 2 * j + n, rest - n) : vec<C>{};
      some = detail::even_lanes<C>(low, high, std::make_index_sequence<n>());
    }
    store_upto(to + j, some, count - j);
  }
}

// How a map lies in working memory so that every tap of every output reads whole vectors. The padded map is
// split by the remainders of row and column modulo the stride; in each part, output pixel (r, c) is at
// r * columns + c, and a tap reads at a constant distance from there. Between the rows of the outputs are
// columns that belong to none.
struct Planes {
  const DynamicConvArgs& args;
  int64_t rows;  // of the output
  int64_t columns, part, channel, height;
  // Of dividing the map's width and its padding by the stride: divisions take as long as short rows.
  int64_t whole, rest, first_column, first_part;

  Planes(const DynamicConvArgs& a, int64_t out_rows)
      : args(a),
        rows(out_rows),
        columns(blocks_of((a.out_width - 1) * a.stride_w + (a.kernel_w - 1) * a.dilation_w + 1, a.stride_w)),
        part(columns *
             blocks_of((out_rows - 1) * a.stride_h + (a.kernel_h - 1) * a.dilation_h + 1, a.stride_h)),
        channel(part * a.stride_h * a.stride_w),
        height(part / columns * a.stride_h),
        whole(a.width / a.stride_w),
        rest(a.width % a.stride_w),
        first_column(a.padding_w / a.stride_w),
        first_part(a.padding_w % a.stride_w) {}

  // From an output pixel to what a tap reads.
  int64_t tap(int64_t ky, int64_t kx) const { return place(ky * args.dilation_h, kx * args.dilation_w); }
  int64_t place(int64_t y, int64_t x) const {  // of the padded map
    return line(y) + x % args.stride_w * part + x / args.stride_w;
  }
  int64_t line(int64_t y) const {
    return y % args.stride_h * args.stride_w * part + y / args.stride_h * columns;
  }
  // Outputs with what lies between them, in whole vectors.
  template <class C>
  int64_t run() const {
    return round_up((rows - 1) * columns + args.out_width, kLanes<C>);
  }
  // Memory for so many channels; the last vector may reach beyond.
  template <class C>
  int64_t size(int64_t channels) const {
    return channels * channel + 2 * kLanes<C>;
  }

  // Copies what output rows from `first` on read of channels c to c + channels - 1 of a sample; `row` is room
  // for a row of all of them.
  template <class T, class C>
  void fill(int64_t b, int64_t c, int64_t channels, int64_t first, C* planes, C* row) const {
    memset(planes, 0, size<C>(channels) * sizeof(C));
    const int64_t top = first * args.stride_h - args.padding_h;
    for (int64_t y = top < 0 ? 0 : top; y < args.height && y - top < height; ++y) {
      const Tile<C> tile =
          load_tile<T>(args.x.as<const T>(), b, c, channels, y * args.width, args.width, row);
      for (int64_t i = 0; i < channels; ++i) {
        for_columns(y - top, [&](int64_t x, int64_t at, int64_t count) {
          copy_strided(tile.data + i * tile.stride + x, args.stride_w, count, planes + i * channel + at);
        });
      }
    }
  }
  // The inverse: the map's gradient from the planes of all rows. Pixels that nothing reads have none.
  template <class T, class C>
  void spill(int64_t b, int64_t c, int64_t channels, const C* planes, C* row) const {
    const int64_t stride = round_up(args.width, kLanes<C>);
    for (int64_t y = 0; y < args.height; ++y) {
      memset(row, 0, channels * stride * sizeof(C));
      if (y + args.padding_h < height) {
        for (int64_t i = 0; i < channels; ++i) {
          for_columns(y + args.padding_h, [&](int64_t x, int64_t at, int64_t count) {
            for (int64_t j = 0; j < count; ++j) {
              row[i * stride + x + j * args.stride_w] = planes[i * channel + at + j];
            }
          });
        }
      }
      store_tile<T>(args.grad_x.as<T>(), b, c, channels, y * args.width, args.width, row, stride);
    }
  }

  // Calls f(x, at, count) for the runs of a row: pixels x, x + stride, ... lie side by side from `at` on.
  template <class F>
  void for_columns(int64_t padded_y, F f) const {
    const int64_t start = line(padded_y);
    int64_t left = first_column, at = start + first_part * part;
    for (int64_t x = 0; x < args.stride_w && x < args.width; ++x, at += part) {
      if (x + first_part == args.stride_w) {
        ++left;
        at = start;
      }
      const int64_t fit = columns - left, there = whole + (x < rest ? 1 : 0);
      if (fit > 0) f(x, at + left, there < fit ? there : fit);
    }
  }
};

// The gradient of some outputs and rows in the planes' order, zero between the rows.
template <class T, class C>
void load_outputs(const DynamicConvArgs& args, const Planes& planes, int64_t b, int64_t c, int64_t channels,
                  int64_t first, C* out, C* scratch) {
  const int64_t run = planes.run<C>(), count = planes.rows * args.out_width;
  const Tile<C> tile =
      load_tile<T>(args.grad_y.as<const T>(), b, c, channels, first * args.out_width, count, scratch);
  memset(out, 0, channels * run * sizeof(C));
  for (int64_t i = 0; i < channels; ++i) {
    for (int64_t r = 0; r < planes.rows; ++r) {
      memcpy(out + i * run + r * planes.columns, tile.data + i * tile.stride + r * args.out_width,
             args.out_width * sizeof(C));
    }
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
