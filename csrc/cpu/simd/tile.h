// Tiles: a few channels (rows) of a run of pixels (columns), in the compute type, zero-padded to whole
// vectors of pixels. A tile hides the element type and the memory format of a feature map from the
// arithmetic, which always has pixels in the lanes.
#pragma once

#include <utility>

#include "../feature_map.h"
#include "vec.h"

namespace mfk {
namespace MFK_ISA {

// Calls f with a value of the element type that `dtype` names.
template <class F>
MFK_INLINE void with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat:
      return f(float{});
    case Dtype::kDouble:
      return f(double{});
    case Dtype::kBf16:
      return f(bf16{});
  }
}

namespace detail {

// One stage of the transposition of a square of vectors: swaps the off-diagonal blocks of side kStep.
template <class C, int kStep, size_t... kLane>
MFK_INLINE void swap_blocks(vec<C>& a, vec<C>& b, std::index_sequence<kLane...>) {
  constexpr int n = kLanes<C>;
#if defined(__clang__)
  vec<C> low = __builtin_shufflevector(a, b, ((kLane & kStep) ? n + kLane - kStep : kLane)...);
  vec<C> high = __builtin_shufflevector(a, b, ((kLane & kStep) ? n + kLane : kLane + kStep)...);
#else
  using lane = typename IntegerOf<C>::type;
  vec<C> low =
      __builtin_shuffle(a, b, mask<C>{static_cast<lane>((kLane & kStep) ? n + kLane - kStep : kLane)...});
  vec<C> high =
      __builtin_shuffle(a, b, mask<C>{static_cast<lane>((kLane & kStep) ? n + kLane : kLane + kStep)...});
#endif
  a = low;
  b = high;
}

template <class C, int kStep>
MFK_INLINE void transpose_stage(vec<C> (&rows)[kLanes<C>]) {
  if constexpr (kStep < kLanes<C>) {
    for (int i = 0; i < kLanes<C>; ++i) {
      if ((i & kStep) == 0) {
        swap_blocks<C, kStep>(rows[i], rows[i + kStep], std::make_index_sequence<kLanes<C>>());
      }
    }
    transpose_stage<C, kStep * 2>(rows);
  }
}

}  // namespace detail

template <class C>
MFK_INLINE void transpose(vec<C> (&rows)[kLanes<C>]) {
  detail::transpose_stage<C, 1>(rows);
}

// The sum of each vector's lanes, for a power of two of vectors: that of rows[i] in lane i. Their lanes are
// added in pairs, and two vectors of sums share one from then on.
template <class C, int kCount, int kStep = 1>
MFK_INLINE vec<C> sums_across(vec<C> (&rows)[kCount]) {
  constexpr auto lanes = std::make_index_sequence<kLanes<C>>();
  if constexpr (kCount > 1) {
    vec<C> pairs[kCount / 2];
    for (int i = 0; i < kCount / 2; ++i) {
      detail::swap_blocks<C, kStep>(rows[2 * i], rows[2 * i + 1], lanes);
      pairs[i] = rows[2 * i] + rows[2 * i + 1];
    }
    return sums_across<C, kCount / 2, kStep * 2>(pairs);
  } else if constexpr (kStep < kLanes<C>) {
    vec<C> other = rows[0];
    detail::swap_blocks<C, kStep>(rows[0], other, lanes);
    rows[0] += other;
    return sums_across<C, 1, kStep * 2>(rows);
  } else {
    return rows[0];
  }
}

template <class C>
struct Tile {
  const C* data;
  int64_t stride;  // from row to row
};

// Copies pixels p to p+count-1 of channels c to c+channels-1 into rows at a distance of `stride`, whole
// vectors each.
template <class T>
void copy_tile(const FeatureMap<const T>& map, int64_t b, int64_t c, int64_t channels, int64_t p,
               int64_t count, compute_t<T>* out, int64_t stride) {
  using C = compute_t<T>;
  constexpr int64_t n = kLanes<C>;
  const T* first = map.at(b, c, p);
  if (map.stride_p == 1) {
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t j = 0; j < count; j += n) {
        store(out + i * stride + j, load_upto(first + i * map.stride_c + j, count - j));
      }
    }
    return;
  }
  for (int64_t j = 0; j < count; j += n) {
    for (int64_t i = 0; i < channels; i += n) {
      vec<C> rows[n];
      for (int64_t r = 0; r < n; ++r) {
        rows[r] = j + r < count ? load_upto(first + (j + r) * map.stride_p + i, channels - i) : vec<C>{};
      }
      transpose<C>(rows);
      for (int64_t r = 0; r < n && i + r < channels; ++r) store(out + (i + r) * stride + j, rows[r]);
    }
  }
}

// The same, except that where the map itself can serve as the tile nothing is copied. `scratch` holds
// channels x round_up(count, lanes).
template <class T>
Tile<compute_t<T>> load_tile(const FeatureMap<const T>& map, int64_t b, int64_t c, int64_t channels,
                             int64_t p, int64_t count, compute_t<T>* scratch) {
  using C = compute_t<T>;
  const int64_t width = round_up(count, kLanes<C>);
  if constexpr (sizeof(T) == sizeof(C)) {
    if (map.stride_p == 1 && width == count) {
      return {reinterpret_cast<const C*>(map.at(b, c, p)), map.stride_c};
    }
  }
  copy_tile<T>(map, b, c, channels, p, count, scratch, width);
  return {scratch, width};
}

// The inverse: writes a tile into the map.
template <class T>
void store_tile(const FeatureMap<T>& map, int64_t b, int64_t c, int64_t channels, int64_t p, int64_t count,
                const compute_t<T>* tile, int64_t stride) {
  using C = compute_t<T>;
  constexpr int64_t n = kLanes<C>;
  T* first = map.at(b, c, p);
  if (map.stride_p == 1) {
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t j = 0; j < count; j += n) {
        store_upto(first + i * map.stride_c + j, load(tile + i * stride + j), count - j);
      }
    }
    return;
  }
  for (int64_t j = 0; j < count; j += n) {
    for (int64_t i = 0; i < channels; i += n) {
      vec<C> rows[n];
      for (int64_t r = 0; r < n; ++r) {
        rows[r] = i + r < channels ? load(tile + (i + r) * stride + j) : vec<C>{};
      }
      transpose<C>(rows);
      for (int64_t r = 0; r < n && j + r < count; ++r) {
        store_upto(first + (j + r) * map.stride_p + i, rows[r], channels - i);
      }
    }
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
