// The two small matrix products that everything between tokens and pixels is made of.
#pragma once

#include <type_traits>

#include "tile.h"

namespace mfk {
namespace MFK_ISA {

// A small matrix anywhere in memory: element (i, j) at data[i * row + j * column].
template <class C>
struct Matrix {
  const C* data;
  int64_t row, column;
};

// Rows of pixels: side by side at one distance, or each at its own place.
template <class C>
struct RowsBy {
  const C* data;
  int64_t stride;
  MFK_INLINE const C* at(int64_t j) const { return data + j * stride; }
  MFK_INLINE RowsBy from(int64_t j) const { return {at(j), stride}; }
};
template <class C>
struct RowsAt {
  const C* data;
  const int64_t* places;
  MFK_INLINE const C* at(int64_t j) const { return data + places[j]; }
  MFK_INLINE RowsAt from(int64_t j) const { return {data, places + j}; }
};

namespace detail {

// A sum of so many products is added to the total as one: long chains would gather rounding errors, and so
// would many totals.
MFK_INLINE int64_t chain_of(int64_t depth) { return depth <= 128 ? 8 : 16; }

// A sum of doubles keeps what each addition rounds off.
template <class C>
using Sum = std::conditional_t<sizeof(C) == sizeof(double), WideSum<double>, vec<C>>;
MFK_INLINE void add_product(vec<float>& sum, vec<float> a, vec<float> b) { sum += a * b; }
MFK_INLINE void add_product(WideSum<double>& sum, vec<double> a, vec<double> b) { sum.add_product(a, b); }
MFK_INLINE vec<float> folded(vec<float> sum) { return sum; }
MFK_INLINE vec<double> folded(const WideSum<double>& sum) { return sum.folded(); }

template <class C, int kRows, int kVectors, class Right>
MFK_INLINE void pixels_block(C* out, int64_t out_stride, const C* start, int64_t start_stride, Matrix<C> a,
                             int64_t depth, Right b, int64_t p) {
  constexpr int n = kLanes<C>;
  const int64_t chain = chain_of(depth);
  vec<C> total[kRows][kVectors] = {};
  for (int64_t begin = 0; begin < depth; begin += chain) {
    const int64_t end = depth - begin < chain ? depth : begin + chain;
    Sum<C> acc[kRows][kVectors] = {};
    for (int64_t j = begin; j < end; ++j) {
      vec<C> column[kVectors];
      for (int v = 0; v < kVectors; ++v) column[v] = load(b.at(j) + p + v * n);
      for (int r = 0; r < kRows; ++r) {
        vec<C> factor = splat(a.data[r * a.row + j * a.column]);
        for (int v = 0; v < kVectors; ++v) add_product(acc[r][v], factor, column[v]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) total[r][v] += folded(acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      // Added last, not first: a large start would round every one of the products.
      if (start != nullptr) total[r][v] += load(start + r * start_stride + v * n);
      store(out + r * out_stride + v * n, total[r][v]);
    }
  }
}

template <class C, int kVectors, class Right>
MFK_INLINE void pixels_column(C* out, int64_t out_stride, const C* start, int64_t start_stride, int64_t rows,
                              Matrix<C> a, int64_t depth, Right b, int64_t p) {
  int64_t i = 0;
  auto block = [&](auto block_rows) __attribute__((always_inline)) {
    constexpr int n = decltype(block_rows)::value;
    pixels_block<C, n, kVectors, Right>(
        out + i * out_stride + p, out_stride, start == nullptr ? nullptr : start + i * start_stride + p,
        start_stride, Matrix<C>{a.data + i * a.row, a.row, a.column}, depth, b, p);
    i += n;
  };
  while (rows - i >= 6) block(std::integral_constant<int, 6>());
  if (rows - i >= 3) block(std::integral_constant<int, 3>());
  while (rows - i >= 1) block(std::integral_constant<int, 1>());
}

template <class C, int kRows, int kColumns>
MFK_INLINE void reduce_block(double* out, int64_t out_row, int64_t out_column, const C* a, int64_t a_stride,
                             const C* b, int64_t b_stride, int64_t width) {
  vec<C> acc[kRows * kColumns] = {};
  for (int64_t p = 0; p < width; p += kLanes<C>) {
    vec<C> right[kColumns];
    for (int j = 0; j < kColumns; ++j) right[j] = load(b + j * b_stride + p);
    for (int i = 0; i < kRows; ++i) {
      vec<C> left = load(a + i * a_stride + p);
      for (int j = 0; j < kColumns; ++j) acc[i * kColumns + j] += left * right[j];
    }
  }
  // Of doubles: the sums of lanes may cancel.
  constexpr int kSums = kRows * kColumns > 8 ? 16 : kRows * kColumns > 4 ? 8 : 4;
  constexpr int kGroup = kSums < kLanes<double> ? kSums : kLanes<double>;
  double sums[kSums / kGroup * kLanes<double>];
  for (int g = 0; g < kSums; g += kGroup) {
    vec<double> group[kGroup];
    for (int i = 0; i < kGroup; ++i) {
      group[i] = g + i < kRows * kColumns ? wide_lanes<C>(acc[g + i]) : vec<double>{};
    }
    store(sums + g, sums_across<double, kGroup>(group));
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) out[i * out_row + j * out_column] += sums[i * kColumns + j];
  }
}

// As many rows as leave registers for the rest.
constexpr int kReducedRows = MFK_VECTOR_REGISTERS == 32 ? 4 : 3, kReducedColumns = 4;

template <class C, int kRows>
MFK_INLINE void reduce_rows(double* out, int64_t out_row, int64_t out_column, const C* a, int64_t a_stride,
                            const C* b, int64_t b_stride, int64_t columns, int64_t width) {
  for (int64_t j = 0; j < columns; j += kReducedColumns) {
    with_constant<kReducedColumns>(columns - j < kReducedColumns ? columns - j : kReducedColumns,
                                   [&](auto block) __attribute__((always_inline)) {
                                     reduce_block<C, kRows, decltype(block)::value>(
                                         out + j * out_column, out_row, out_column, a, a_stride,
                                         b + j * b_stride, b_stride, width);
                                   });
  }
}

}  // namespace detail

// out[i][p] = start[i][p] + sum_j a(i, j) * b.at(j)[p] for i < rows, j < depth, p < width, a multiple of the
// lanes. `start` may be null for zero, and may be `out`.
template <class C, class Right>
void multiply_pixels(C* out, int64_t out_stride, const C* start, int64_t start_stride, int64_t rows,
                     Matrix<C> a, int64_t depth, Right b, int64_t width) {
  constexpr int64_t n = kLanes<C>,
                    kDeep = 256;  // two vectors of so many rows fill half of the first-level cache
  for (int64_t first = 0; first == 0 || first < depth; first += kDeep) {
    const C* from = first == 0 ? start : out;
    const int64_t stride = first == 0 ? start_stride : out_stride;
    const int64_t deep = depth - first < kDeep ? depth - first : kDeep;
    const Matrix<C> left{a.data + first * a.column, a.row, a.column};
    const Right right = b.from(first);
    int64_t p = 0;
    for (; p + 2 * n <= width; p += 2 * n) {
      detail::pixels_column<C, 2, Right>(out, out_stride, from, stride, rows, left, deep, right, p);
    }
    if (p < width) {
      detail::pixels_column<C, 1, Right>(out, out_stride, from, stride, rows, left, deep, right, p);
    }
  }
}

template <class C>
void multiply_pixels(C* out, int64_t out_stride, const C* start, int64_t start_stride, int64_t rows,
                     Matrix<C> a, int64_t depth, const C* b, int64_t b_stride, int64_t width) {
  multiply_pixels<C>(out, out_stride, start, start_stride, rows, a, depth, RowsBy<C>{b, b_stride}, width);
}

// out[i * out_row + j * out_column] += sum_p a[i][p] * b[j][p] for i < rows, j < columns, p < width.
// No lane sums more than kRun products before the sum goes into a double.
template <class C>
void multiply_reduce(double* out, int64_t out_row, int64_t out_column, int64_t rows, const C* a,
                     int64_t a_stride, int64_t columns, const C* b, int64_t b_stride, int64_t width) {
  constexpr int64_t kRun = 16 * kLanes<C>;
  for (int64_t p = 0; p < width; p += kRun) {
    const int64_t run = width - p < kRun ? width - p : kRun;
    for (int64_t i = 0; i < rows; i += detail::kReducedRows) {
      const int64_t block = rows - i < detail::kReducedRows ? rows - i : detail::kReducedRows;
      with_constant<detail::kReducedRows>(block, [&](auto block_rows) __attribute__((always_inline)) {
        detail::reduce_rows<C, decltype(block_rows)::value>(out + i * out_row, out_row, out_column,
                                                            a + i * a_stride + p, a_stride, b + p, b_stride,
                                                            columns, run);
      });
    }
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
