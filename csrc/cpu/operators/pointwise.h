// Products of a matrix with the rows of a map as they lie: pixels in the lanes.
#pragma once

#include "../simd/tile_gemm.h"
#include "../sizes.h"

namespace mfk {
namespace MFK_ISA {

// What is done to a sum before it is stored at `to`: `at(i)` loads what depends on the row alone. Here,
// nothing.
template <class C>
struct AsItIs {
  struct At {
    template <class T>
    MFK_INLINE vec<C> operator()(vec<C> y, const T*) const {
      return y;
    }
  };
  MFK_INLINE At at(int64_t) const { return {}; }
};
// It is added to what is there, a whole vector.
template <class C>
struct AddTo {
  struct At {
    MFK_INLINE vec<C> operator()(vec<C> y, const C* to) const { return load(to) + y; }
  };
  MFK_INLINE At at(int64_t) const { return {}; }
};

namespace pointwise {

// Blocks of kRows rows by kVectors vectors of pixels: what the registers hold, and few enough rows that none
// of them has to be copied elsewhere to be read fast. So many values of the map stay in a cache while all
// rows pass: in the second level's, or, where a block does fewer products with what it reads, in the first
// level's.
#if MFK_VECTOR_REGISTERS == 32
constexpr int kRows = 8;
constexpr int64_t kCached = 32768;
#else
constexpr int kRows = 4;
constexpr int64_t kCached = 6144;
#endif
constexpr int kVectors = 3;

// A part of a product: a(i, j) b.at(j)[p] for j from `begin` to `end`. The sums of the parts before it are
// added to it, and its own kept for the next one.
template <class T, class C, class Right, class Epilogue>
struct Product {
  T* out;
  int64_t out_stride;
  Matrix<C> a;
  Right b;
  int64_t begin, end, partial_stride;
  bool last;  // j reaches its end
  Epilogue epilogue;
};

// Some rows from `first` on, and vectors of pixels from p on, of the last of which only `rest` lanes exist.
// `partial` has the sums of these pixels, a row each `partial_stride`.
template <int kRows, int kVectors, bool kWhole, class T, class C, class Right, class Epilogue>
MFK_INLINE void block(const Product<T, C, Right, Epilogue>& by, int64_t first, int64_t p, C* partial,
                      int64_t rest) {
  constexpr int n = kLanes<C>;
  const Matrix<C> a{by.a.data + first * by.a.row, by.a.row, by.a.column};
  // All indices are constants: only so do these stay in registers.
  vec<C> sums[kRows * kVectors] = {};
  for (int64_t j = by.begin; j < by.end; ++j) {
    vec<C> column[kVectors];
    const auto* b = by.b.at(j) + p;
    unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
      const auto* at = b + v * n;
      column[v] = in_register(kWhole || v + 1 < kVectors ? load(at) : load_upto(at, rest));
    });
    unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
      const vec<C> factor = splat(a.data[r * a.row + j * a.column]);
      unrolled<kVectors>(
          [&](auto v) __attribute__((always_inline)) { sums[r * kVectors + v] += factor * column[v]; });
    });
  }
  partial += first * by.partial_stride;
  if (by.begin > 0) {
    unrolled<kRows * kVectors>([&](auto i) __attribute__((always_inline)) {
      sums[i] += load(partial + i / kVectors * by.partial_stride + i % kVectors * n);
    });
  }
  if (!by.last) {
    unrolled<kRows * kVectors>([&](auto i) __attribute__((always_inline)) {
      store(partial + i / kVectors * by.partial_stride + i % kVectors * n, sums[i]);
    });
    return;
  }
  unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
    const auto finish = by.epilogue.at(first + r);
    unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
      T* to = by.out + (first + r) * by.out_stride + p + v * n;
      const vec<C> y = finish(sums[r * kVectors + v], to);
      kWhole || v + 1 < kVectors ? store(to, y) : store_upto(to, y, rest);
    });
  });
}

// Some rows at a time: calls f with how many, and the first one.
template <class F>
MFK_INLINE void for_rows(int64_t rows, F f) {
  int64_t i = 0;
  auto some = [&](auto count) __attribute__((always_inline)) {
    for (; rows - i >= decltype(count)::value; i += decltype(count)::value) f(count, i);
  };
  some(std::integral_constant<int, kRows>());
  if (kRows > 4) some(std::integral_constant<int, 4>());
  some(std::integral_constant<int, 1>());
}

// A few pixels, which would leave most lanes of a vector empty: inputs in the lanes. The rows of `a` lie in
// one piece.
template <int kChain, int kPixels, class T, class C, class Right, class Epilogue>
void few_pixels(T* out, int64_t out_stride, int64_t rows, Matrix<C> a, int64_t depth, Right b, int64_t first,
                Epilogue epilogue) {
  Buffer<C> columns(kPixels * depth);
  for (int64_t j = 0; j < depth; ++j) {
    for (int p = 0; p < kPixels; ++p) columns[p * depth + j] = to_compute(b.at(j)[first + p]);
  }
  for (int64_t i = 0; i < rows; ++i) {
    vec<C> total[kPixels] = {};
    for (int64_t j = 0; j < depth;) {
      vec<C> sums[kPixels] = {};
      const int64_t end = depth - j < kChain * kLanes<C> ? depth : j + kChain * kLanes<C>;
      for (; j < end; j += kLanes<C>) {
        const vec<C> factors = load_upto(a.data + i * a.row + j, depth - j);
        for (int p = 0; p < kPixels; ++p) sums[p] += factors * load_upto(columns + p * depth + j, depth - j);
      }
      for (int p = 0; p < kPixels; ++p) total[p] += sums[p];
    }
    const auto finish = epilogue.at(i);
    for (int p = 0; p < kPixels; ++p) {
      const vec<C> y = finish(splat(static_cast<C>(sum_lanes<C>(total[p]))), out + i * out_stride + p);
      store_scalar(out + i * out_stride + p, y[0]);
    }
  }
}

}  // namespace pointwise

// out[i][p] = epilogue_i(sum_j a(i, j) b.at(j)[p]) for i < rows, j < depth, p < width. No more than kLongest
// products are summed at a time, of doubles 16: long chains gather rounding errors.
template <int kLongest, class T, class C, class Right, class Epilogue = AsItIs<C>>
void multiply(T* out, int64_t out_stride, int64_t rows, Matrix<C> a, int64_t depth, Right b, int64_t width,
              Epilogue epilogue = {}) {
  using namespace pointwise;
  constexpr int kChain = sizeof(C) == 8 && kLongest > 16 ? 16 : kLongest;
  constexpr int64_t n = kLanes<C>, whole = kVectors * n, most = n / 4;
  const int64_t longest = depth < kChain ? depth : kChain;
  // As long a way along a row as can be.
  const int64_t cached = kCached / longest / whole * whole, all = blocks_of(width, whole) * whole;
  const int64_t fit = cached < whole ? whole : cached < all ? cached : all;
  Buffer<C> partial(depth > kChain ? rows * fit : 0);
  auto run = [&](auto vectors, auto is_whole, int64_t first, int64_t end, int64_t rest) {
    constexpr int v = decltype(vectors)::value;
    for (int64_t j = 0; j < depth; j += kChain) {
      const int64_t j_end = depth - j < kChain ? depth : j + kChain;
      const Product<T, C, Right, Epilogue> by{out, out_stride, a, b, j, j_end, fit, j_end == depth, epilogue};
      for_rows(rows, [&](auto count, int64_t i) __attribute__((always_inline)) {
        for (int64_t p = first; p < end; p += v * n) {
          block<decltype(count)::value, v, decltype(is_whole)::value>(by, i, p, partial + (p - first), rest);
        }
      });
    }
  };
  const int64_t blocks_end = width / whole * whole;
  for (int64_t p = 0; p < blocks_end; p += fit) {
    const int64_t end = p + fit < blocks_end ? p + fit : blocks_end;
    run(std::integral_constant<int, kVectors>(), std::true_type(), p, end, n);
  }
  // Where there are few inputs a vector that is mostly empty takes less time than sums over its lanes.
  const bool by_lanes = a.column == 1 && width % n <= most && 12 * (width % n) <= depth;
  const int64_t few = by_lanes ? width % n : 0;
  const int64_t vectors_end = width - few;
  with_constant<kVectors>(blocks_of(vectors_end - blocks_end, n), [&](auto vectors) {
    run(vectors, std::false_type(), blocks_end, vectors_end,
        vectors_end - blocks_end - (decltype(vectors)::value - 1) * n);
  });
  with_constant<most>(few, [&](auto pixels) {
    few_pixels<kChain, decltype(pixels)::value>(out + vectors_end, out_stride, rows, a, depth, b, vectors_end,
                                                epilogue);
  });
}

}  // namespace MFK_ISA
}  // namespace mfk
