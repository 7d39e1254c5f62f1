// What deployed networks do to their tokens: a few rows, `stride` floats apart, zero beyond their width.
#pragma once

#include "gemm.h"

namespace mfk {
namespace MFK_ISA {

// (rows, channels), each row padded, as the left side of a product; in `room` where they must be rounded.
MFK_INLINE Rows<Stored> as_stored(const float* in, int64_t rows, int64_t stride, int64_t channels,
                                  Stored* room) {
  if constexpr (sizeof(Stored) == sizeof(float)) {
    return {reinterpret_cast<const Stored*>(in), stride, 1, channels, 0};
  }
  const int64_t width = padded(channels);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < width; c += kLanes<float>) store(room + r * width + c, load(in + r * stride + c));
  }
  return {room, width, 1, channels, 0};
}

// Layer norm of each row, epsilon 1e-5, in place; `affine` holds gamma, then beta, each of `stride` floats.
inline void layer_norm(float* x, int64_t rows, int64_t width, int64_t stride, const float* affine) {
  constexpr int64_t n = kLanes<float>;
  const float *gamma = affine, *beta = affine + stride;
  for (int64_t t = 0; t < rows; ++t) {
    float* row = x + t * stride;
    vec<float> sums{}, squares{};
    for (int64_t i = 0; i < stride; i += n) sums += load(row + i);
    const float mean = static_cast<float>(sum_lanes<float>(sums) / width);
    for (int64_t i = 0; i < stride; i += n) {
      const vec<float> off = load(row + i) - mean;
      squares += off * off;
    }
    // The padding, too, was `mean` off.
    const double variance = (sum_lanes<float>(squares) - (stride - width) * (double{mean} * mean)) / width;
    const float scale = static_cast<float>(1 / __builtin_sqrt(variance + 1e-5));
    for (int64_t i = 0; i < stride; i += n) {  // gamma and beta are zero there
      store(row + i, (load(row + i) - mean) * scale * load(gamma + i) + load(beta + i));
    }
  }
}

// Tokens of a Mobile -> Former, from what tasks have gathered (see Bridge::gather): (tokens, padded
// channels). Records are `record` doubles apart; `room` holds as many doubles as a head has channels.
inline void combine_records(const double* gathered, int64_t records, int64_t record, int64_t heads,
                            int64_t tokens, int64_t channels, float* out, double* room) {
  const int64_t columns = padded(channels), depth = channels / heads, pairs = heads * tokens;
  memset(out, 0, tokens * columns * sizeof(float));
  for (int64_t i = 0; i < pairs; ++i) {
    double top = gathered[i];
    for (int64_t r = 1; r < records; ++r) {
      const double other = gathered[r * record + i];
      top = other > top ? other : top;
    }
    double sum = 0;
    for (int64_t c = 0; c < depth; ++c) room[c] = 0;
    for (int64_t r = 0; r < records; ++r) {
      const double* part = gathered + r * record;
      const double weight = exp_scalar<float>(static_cast<float>(part[i] - top));
      sum += weight * part[pairs + i];
      const double* pixels = part + 2 * pairs + i * depth;
      for (int64_t c = 0; c < depth; ++c) room[c] += weight * pixels[c];
    }
    const double norm = 1 / sum;
    float* row = out + (i % tokens) * columns + i / tokens * depth;
    for (int64_t c = 0; c < depth; ++c) row[c] = static_cast<float>(room[c] * norm);
  }
}

// Queries, keys or values: rows, and floats from one to the next.
struct TokenMatrix {
  const float* data;
  int64_t stride;
};

// Attention of `tokens` rows to each other; `logits` holds as many floats.
inline void attend(TokenMatrix q, TokenMatrix k, TokenMatrix v, int64_t tokens, int64_t heads, int64_t depth,
                   float* out, int64_t out_stride, float* logits) {
  const float scale = 1 / __builtin_sqrtf(static_cast<float>(depth));
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t t = 0; t < tokens; ++t) {
      const float* query = q.data + t * q.stride + head * depth;
      float top = -__FLT_MAX__;
      for (int64_t s = 0; s < tokens; ++s) {
        const float* key = k.data + s * k.stride + head * depth;
        vec<float> sums{};
        int64_t c = 0;
        for (; c + kLanes<float> <= depth; c += kLanes<float>) sums += load(query + c) * load(key + c);
        float sum = static_cast<float>(sum_lanes<float>(sums));
        for (; c < depth; ++c) sum += query[c] * key[c];
        logits[s] = sum * scale;
        top = logits[s] > top ? logits[s] : top;
      }
      float sum = 0;
      for (int64_t s = 0; s < tokens; ++s) {
        logits[s] = exp_scalar<float>(logits[s] - top);
        sum += logits[s];
      }
      float* to = out + t * out_stride + head * depth;
      for (int64_t c = 0; c < depth; ++c) to[c] = 0;
      for (int64_t s = 0; s < tokens; ++s) {
        const float weight = logits[s] / sum;
        const float* value = v.data + s * v.stride + head * depth;
        for (int64_t c = 0; c < depth; ++c) to[c] += weight * value[c];
      }
    }
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
