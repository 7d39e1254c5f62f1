// The two cross attentions between a run of positions (channels last) and a few tokens, for deployed
// networks: for positions that have just been written, and are in cache.
#pragma once

#include "../simd/gemm.h"
#include "../simd/tile.h"
#include "../simd/tile_gemm.h"

namespace mfk {
namespace MFK_ISA {

class Bridge {
 public:
  // `stride`: floats from position to position, a multiple of 16, zero beyond `channels`. `row`: floats from
  // token to token in keys, values and queries. The logits' scale is part of keys and queries.
  Bridge(int64_t channels, int64_t stride, int64_t heads, int64_t tokens, int64_t row)
      : depth_(channels / heads), stride_(stride), heads_(heads), tokens_(tokens), row_(row) {}

  // Floats of working memory for so many positions.
  int64_t scratch(int64_t positions) const { return (stride_ + heads_ * tokens_) * round_up(positions, 16); }

  // The positions, transposed into `scratch`: pixels in the lanes, zero beyond the last.
  void open(const Stored* x, int64_t positions, float* scratch) {
    positions_ = positions;
    width_ = round_up(positions, kLanes<float>);
    tile_ = scratch;
    weights_ = scratch + stride_ * width_;
    load_tile<Stored>(FeatureMap<const Stored>{x, 0, 1, stride_}, 0, 0, stride_, 0, positions, tile_);
  }

  // Mobile <- Former: adds to x softmax over the tokens of (x keys), times values.
  void scatter(Stored* x, const float* keys, const float* values) const {
    logits(keys);
    for (int64_t head = 0; head < heads_; ++head) {
      float* first = weights_ + head * tokens_ * width_;
      for (int64_t p = 0; p < width_; p += kLanes<float>) softmax(first + p);
      float* rows = tile_ + head * depth_ * width_;
      multiply_pixels<float>(rows, width_, rows, width_, depth_,
                             Matrix<float>{values + head * depth_, 1, row_}, tokens_, first, width_, width_);
    }
    store_tile<Stored>(FeatureMap<Stored>{x, 0, 1, stride_}, 0, 0, stride_, 0, positions_, tile_, width_);
  }

  // The part of Mobile -> Former that these positions have. The record: for each pair of a head and a token
  // the largest logit, then the sums of exp(logit - largest), then (heads * tokens, depth) sums of pixels
  // weighted so.
  void gather(const float* queries, double* record) const {
    const int64_t pairs = heads_ * tokens_;
    logits(queries);
    for (int64_t i = 0; i < pairs; ++i) weigh(weights_ + i * width_, record[i], record[pairs + i]);
    double* sums = record + 2 * pairs;
    for (int64_t i = 0; i < pairs * depth_; ++i) sums[i] = 0;
    for (int64_t head = 0; head < heads_; ++head) {
      multiply_reduce<float>(sums + head * tokens_ * depth_, depth_, 1, tokens_,
                             weights_ + head * tokens_ * width_, width_, depth_,
                             tile_ + head * depth_ * width_, width_, width_);
    }
  }

 private:
  void logits(const float* matrix) const {
    for (int64_t head = 0; head < heads_; ++head) {
      multiply_pixels<float>(weights_ + head * tokens_ * width_, width_, nullptr, 0, tokens_,
                             Matrix<float>{matrix + head * depth_, row_, 1}, depth_,
                             tile_ + head * depth_ * width_, width_, width_);
    }
  }

  // Over the tokens, for one vector of positions.
  void softmax(float* first) const {
    vec<float> top = load(first);
    for (int64_t t = 1; t < tokens_; ++t) {
      top = larger(load(first + t * width_), top);
    }
    vec<float> sum{};
    for (int64_t t = 0; t < tokens_; ++t) {
      const vec<float> weight = exp_nonpositive(load(first + t * width_) - top);
      store(first + t * width_, weight);
      sum += weight;
    }
    const vec<float> norm = 1.0f / sum;
    for (int64_t t = 0; t < tokens_; ++t) store(first + t * width_, load(first + t * width_) * norm);
  }

  // exp(logit - largest) of a row, in place.
  void weigh(float* row, double& largest, double& sum) const {
    constexpr int64_t n = kLanes<float>;
    const mask<float> inside = first_lanes<float>(positions_ - (width_ - n));  // of the last vector
    const vec<float> last = load(row + width_ - n);
    store(row + width_ - n, inside ? last : splat(-__FLT_MAX__));
    vec<float> tops = load(row);
    for (int64_t p = n; p < width_; p += n) {
      tops = larger(load(row + p), tops);
    }
    const float top = max_lanes<float>(tops);
    vec<float> sums{};
    for (int64_t p = 0; p < width_; p += n) {
      const vec<float> weight = exp_nonpositive(load(row + p) - top);
      store(row + p, weight);
      sums += weight;
    }
    largest = top;
    sum = sum_lanes<float>(sums);
  }

  int64_t depth_, stride_, heads_, tokens_, row_;
  int64_t positions_ = 0, width_ = 0;
  float *tile_ = nullptr, *weights_ = nullptr;
};

}  // namespace MFK_ISA
}  // namespace mfk
