// The two cross attentions between a run of positions (channels last) and a few tokens, for deployed
// networks: where the positions have just been written, and are in cache.
#pragma once

#include "gemm.h"
#include "tile.h"

namespace mfk {
namespace MFK_ISA {

struct Bridge {
  int64_t channels, stride;  // of a position: true ones, and floats from one to the next
  int64_t heads, tokens, lanes;  // lanes: heads * tokens, padded to 16; lane head * tokens + token

  int64_t pairs() const { return heads * tokens; }
  // Floats of working memory for so many positions.
  int64_t scratch(int64_t positions) const { return 2 * lanes * round_up(positions, 16); }

  // Mobile <- Former: x += softmax over the tokens of (x keys), times values.
  void scatter(float* x, int64_t positions, const float* keys, const float* values, float* scratch) const {
    constexpr int64_t n = kLanes<float>;
    const int64_t width = round_up(positions, n);
    float* weights = scratch + lanes * width;
    logits(x, positions, keys, scratch, weights);
    for (int64_t head = 0; head < heads; ++head) {
      float* first = weights + head * tokens * width;
      for (int64_t p = 0; p < width; p += n) {
        vec<float> top = load(first + p);
        for (int64_t t = 1; t < tokens; ++t) {
          const vec<float> value = load(first + t * width + p);
          top = value > top ? value : top;
        }
        vec<float> sum{};
        for (int64_t t = 0; t < tokens; ++t) {
          const vec<float> weight = exp(load(first + t * width + p) - top);
          store(first + t * width + p, weight);
          sum += weight;
        }
        const vec<float> norm = 1.0f / sum;
        for (int64_t t = 0; t < tokens; ++t) {
          store(first + t * width + p, load(first + t * width + p) * norm);
        }
      }
    }
    transpose_blocks(weights, width, pairs(), width, scratch, lanes);
    gemm(positions, Rows{scratch, lanes, 1, pairs(), 0}, Weights::matrix(values, stride, stride), x, stride,
         AddResidual{nullptr, x, stride});
  }

  // The part of Mobile -> Former that these positions have; the record's layout is that of `gathered` in
  // deployed_mobile_former.h.
  void gather(const float* x, int64_t positions, const float* queries, float* record, float* scratch) const {
    constexpr int64_t n = kLanes<float>;
    const int64_t width = round_up(positions, n);
    float* weights = scratch + lanes * width;
    logits(x, positions, queries, scratch, weights);
    for (int64_t i = 0; i < pairs(); ++i) {
      float* row = weights + i * width;
      const mask<float> inside = first_lanes<float>(positions - (width - n));  // of the last vector
      const vec<float> last = load(row + width - n);
      store(row + width - n, inside ? last : splat(-__FLT_MAX__));
      vec<float> tops = load(row);
      for (int64_t p = n; p < width; p += n) {
        const vec<float> value = load(row + p);
        tops = value > tops ? value : tops;
      }
      const float top = max_lanes<float>(tops);
      vec<float> sums{};
      for (int64_t p = 0; p < width; p += n) {
        const vec<float> weight = exp(load(row + p) - top);
        store(row + p, weight);
        sums += weight;
      }
      record[i] = top;
      record[lanes + i] = static_cast<float>(sum_lanes<float>(sums));
    }
    gemm(pairs(), Rows{weights, width, 1, positions, 0}, Weights::matrix(x, stride, stride), record + 2 * lanes,
         stride, Store{});
  }

 private:
  // (positions, lanes) in `rows`, and transposed, (lanes, width), in `columns`.
  void logits(const float* x, int64_t positions, const float* matrix, float* rows, float* columns) const {
    const int64_t width = round_up(positions, kLanes<float>);
    gemm(positions, Rows{x, stride, 1, channels, 0}, Weights::matrix(matrix, lanes, lanes), rows, lanes,
         Store{});
    memset(rows + positions * lanes, 0, (width - positions) * lanes * sizeof(float));
    transpose_blocks(rows, lanes, width, pairs(), columns, width);
  }

  // to[j][i] = from[i][j] for i < height, j < width, in whole blocks: both have room for a multiple of the
  // vector's lanes.
  static void transpose_blocks(const float* from, int64_t from_stride, int64_t height, int64_t width, float* to,
                               int64_t to_stride) {
    constexpr int64_t n = kLanes<float>;
    for (int64_t i = 0; i < height; i += n) {
      for (int64_t j = 0; j < width; j += n) {
        vec<float> block[n];
        for (int64_t r = 0; r < n; ++r) block[r] = load(from + (i + r) * from_stride + j);
        transpose<float>(block);
        for (int64_t r = 0; r < n; ++r) store(to + (j + r) * to_stride + i, block[r]);
      }
    }
  }
};

}  // namespace MFK_ISA
}  // namespace mfk
