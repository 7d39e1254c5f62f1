// Attention of one window for deployed networks, gated or not: pixels are rows, products those of gemm.h.
#pragma once

#include "../simd/gemm.h"
#include "../simd/tile.h"
#include "activation_pass.h"
#include "deployed_plan.h"

namespace mfk {
namespace MFK_ISA {

// A panel of a right side that is not packed yet: `row(i, j)` is a vector of the outputs from j on of input
// i.
template <class F>
MFK_INLINE void pack_panel(float* panel, int64_t inputs, F row) {
  for (int64_t i = 0; i < inputs; i += kStep<Stored>, panel += kPanel) {
    for (int64_t j = 0; j < kPanel; j += kLanes<float>) {
      const vec<float> value = row(i, j);
      if constexpr (kStep<Stored> == 1) {
        store(panel + j, value);
      } else {
        bf16 pair[2][kLanes<float>];
        store(pair[0], value);
        store(pair[1], i + 1 < inputs ? row(i + 1, j) : vec<float>{});
        using half = typename VectorOf<uint16_t, kLanes<float>>::type;
        using word = typename VectorOf<uint32_t, kLanes<float>>::type;
        half bits[2];
        memcpy(bits, pair, sizeof bits);
        const word both = __builtin_convertvector(bits[0], word) | __builtin_convertvector(bits[1], word)
                                                                       << 16;
        memcpy(panel + j, &both, sizeof both);
      }
    }
  }
}

// With P = softmax(q k^T) and a gate's function f, sigmoid or SiLU: y = (P f(v)) f(gate), or, with `outside`,
// f(P v) f(gate). Without gates y = P v.
class WindowAttention {
 public:
  // A pixel holds queries, with the logits' scale in them, keys, values and gates, each padded for each head.
  WindowAttention(int64_t pixels, const AttentionStep& step)
      : pixels_(pixels),
        heads_(step.heads),
        depth_(step.depth),
        channels_(step.channels),
        pixel_(attention_pixel(step)),
        gating_(step.gating),
        outside_(step.outside) {}

  // Floats of working memory for so many queries at a time.
  int64_t scratch(int64_t queries) const {
    return keys_size() + values_size() + kPanel * padded(depth_) + queries * (2 * padded(pixels_) + 1) + 64;
  }

  // Keys and values of a window's head, as right sides of products.
  void open(const Stored* x, int64_t head, float* scratch) {
    const int64_t keys = heads_ * padded(depth_), channels = padded(channels_);
    queries_ = x + head * padded(depth_);
    gates_ = x + 2 * keys + heads_ * channels + head * channels;
    keys_ = scratch;
    values_ = keys_ + keys_size();
    float* tile = values_ + values_size();
    logits_ = tile + kPanel * padded(depth_);
    const Stored *k = queries_ + keys, *v = x + 2 * keys + head * channels;
    for (int64_t o = 0; o < padded(pixels_); o += kPanel) {
      const int64_t count = pixels_ - o < kPanel ? pixels_ - o : kPanel;
      const Tile<float> turned =
          load_tile<Stored>(FeatureMap<const Stored>{k, 0, 1, pixel_}, 0, 0, depth_, o, count, tile);
      pack_panel(keys_ + o * weight_rows(depth_), depth_, [&](int64_t i, int64_t j) {
        return j < turned.stride ? load(turned.data + i * turned.stride + j) : vec<float>{};
      });
    }
    for (int64_t o = 0; o < padded(channels_); o += kPanel) {
      pack_panel(values_ + o * weight_rows(pixels_), pixels_, [&](int64_t i, int64_t j) {
        const vec<float> value = load(v + i * pixel_ + o + j);
        if (outside_ || gating_ == kUngated) return value;
        return gating_ == kSiluGate ? silu(value) : sigmoid(value);
      });
    }
  }

  // y of the queries `first` to first + count - 1, so many numbers from one to the next. Its padding is not
  // zero.
  void run(int64_t first, int64_t count, Stored* y, int64_t stride) const {
    const int64_t width = padded(pixels_);
    float* inverse = logits_ + count * width;
    auto* weights = reinterpret_cast<Stored*>(inverse + round_up(count, 16));
    const Stored* queries = queries_ + first * pixel_;
    gemm(count, Rows<Stored>{queries, pixel_, 1, depth_, 0}, Weights{keys_, width}, logits_, width, Plain{});
    for (int64_t i = 0; i < count; ++i) {
      inverse[i] = softmax(logits_ + i * width, weights + i * width);
    }
    auto finish = [&](auto epilogue) {
      gemm(count, Rows<Stored>{weights, width, 1, pixels_, 0}, Weights{values_, padded(channels_)},
           y + first * stride, stride, epilogue);
    };
    const Stored* gates = gates_ + first * pixel_;
    if (gating_ == kUngated) return finish(Scale{inverse});
    gating_ == kSiluGate ? finish(Gate<true>{inverse, gates, pixel_, outside_})
                         : finish(Gate<false>{inverse, gates, pixel_, outside_});
  }

 private:
  int64_t keys_size() const { return weight_rows(depth_) * padded(pixels_); }
  int64_t values_size() const { return weight_rows(pixels_) * padded(channels_); }

  struct Plain {
    struct At {
      vec<float> bias;
      MFK_INLINE vec<float> operator()(vec<float> y, int64_t) const { return y; }
    };
    MFK_INLINE At at(int64_t) const { return {vec<float>{}}; }
  };
  struct Scale {
    const float* inverse;
    struct At {
      vec<float> bias;
      const float* inverse;
      MFK_INLINE vec<float> operator()(vec<float> y, int64_t p) const { return y * inverse[p]; }
    };
    MFK_INLINE At at(int64_t) const { return {vec<float>{}, inverse}; }
  };
  template <bool kSilu>
  struct Gate {
    static MFK_INLINE vec<float> function(vec<float> x) { return kSilu ? silu(x) : sigmoid(x); }

    const float* inverse;
    const Stored* gate;
    int64_t pixel;
    bool outside;
    struct At {
      vec<float> bias;
      const float* inverse;
      const Stored* gate;
      int64_t pixel;
      bool outside;
      MFK_INLINE vec<float> operator()(vec<float> y, int64_t p) const {
        const vec<float> context = y * inverse[p];
        return (outside ? function(context) : context) * function(load(gate + p * pixel));
      }
    };
    MFK_INLINE At at(int64_t o) const { return {vec<float>{}, inverse, gate + o, pixel, outside}; }
  };

  // exp(logit - largest), zero beyond the pixels; returns one over their sum.
  float softmax(const float* logits, Stored* weights) const {
    constexpr int64_t n = kLanes<float>;
    vec<float> tops = splat(-__FLT_MAX__);
    auto at = [&](int64_t p) {
      const vec<float> value = load(logits + p);
      return p + n <= pixels_ ? value : (first_lanes<float>(pixels_ - p) ? value : splat(-__FLT_MAX__));
    };
    for (int64_t p = 0; p < pixels_; p += n) tops = larger(at(p), tops);
    const float top = max_lanes<float>(tops);
    vec<float> sum{};
    for (int64_t p = 0; p < padded(pixels_); p += n) {
      vec<float> weight{};
      if (p < pixels_) weight = exp_nonpositive(at(p) - top);
      if (p + n > pixels_) weight = first_lanes<float>(pixels_ - p) ? weight : vec<float>{};
      store(weights + p, weight);
      sum += weight;
    }
    return static_cast<float>(1 / sum_lanes<float>(sum));
  }

  int64_t pixels_, heads_, depth_, channels_, pixel_, gating_;
  bool outside_;
  const Stored *queries_ = nullptr, *gates_ = nullptr;
  float *keys_ = nullptr, *values_ = nullptr, *logits_ = nullptr;
};

}  // namespace MFK_ISA
}  // namespace mfk
