// The Former of one sample in one thread block: its few tokens stay in shared memory, and the weights stream
// by, each read once for eight tokens.
#pragma once

#include <stdint.h>

#include "device.cuh"

namespace mfk {
namespace cuda {

constexpr int kThreads = 512;
constexpr int kParts = 4;  // threads that share a sum; neighbours read neighbouring weights
constexpr int kRows = 8;   // tokens that are multiplied by a weight at a time, if there are several

struct FormerSizes {
  int tokens, width, heads, hidden;
  bool standard, ffn;
  float eps;
};

// Biases may be null.
template <class T>
struct FormerWeights {
  const T *qkv_weight, *qkv_bias, *proj_weight, *proj_bias, *norm1_weight, *norm1_bias;
  const T *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias, *norm2_weight, *norm2_bias;
};

// Shared memory, in floats: the tokens, a second copy of them, the widest rows between (or rows that are as
// wide as wanted), and what the tokens give to one another. Rows are whole vectors, and there are as many as
// are multiplied at a time.
struct FormerRooms {
  int row, wide, second, between, weights;
  int64_t total;
  __host__ __device__ explicit FormerRooms(const FormerSizes& s, int widest = 0) {
    const int rows = (s.tokens + kRows - 1) / kRows * kRows, queries = s.standard ? 3 * s.width : s.width;
    widest = s.hidden > widest ? s.hidden : widest;
    widest = queries > widest ? queries : widest;
    row = (s.width + 3) / 4 * 4;
    wide = (widest + 3) / 4 * 4;
    second = rows * row;
    between = 2 * second;
    weights = between + rows * wide;
    // Of sizes that are too large by far, too.
    total = int64_t{2} * second + int64_t{rows} * wide + int64_t{s.heads} * s.tokens * s.tokens;
  }
};

__device__ inline float warp_sum(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// finish(t, n, x w^T + bias) for each token t and output n. x: rows of `stride` floats, w: (outputs, inputs).
// Tokens are multiplied kAtOnce at a time; there must be memory for whole such parts.
template <int kAtOnce = kRows, class T, class Finish>
__device__ void linear(const float* x, int stride, int tokens, int inputs, const T* w, const T* bias,
                       int outputs, Finish finish) {
  const int part = threadIdx.x % kParts;
  for (int first = 0; first < tokens; first += kAtOnce) {
    for (int start = 0; start < outputs; start += kThreads / kParts) {
      const int n = start + threadIdx.x / kParts;
      float sums[kAtOnce] = {};
      if (n < outputs) {
        const T* row = w + static_cast<int64_t>(n) * inputs;
        auto add = [&](int k, float weight) {
          for (int r = 0; r < kAtOnce; ++r) sums[r] += x[(first + r) * stride + k] * weight;
        };
        constexpr int kWide = 4;
        if (inputs % kWide == 0) {
#pragma unroll 2
          for (int k = kWide * part; k < inputs; k += kWide * kParts) {
            float weights[kWide];
            load4(row + k, weights);
            for (int i = 0; i < kWide; ++i) add(k + i, weights[i]);
          }
        } else {
          for (int k = part; k < inputs; k += kParts) add(k, widen(row[k]));
        }
      }
      const float own = n < outputs && bias != nullptr ? widen(bias[n]) : 0.0f;
      for (int r = 0; r < kAtOnce; ++r) {
        float sum = sums[r];
        for (int step = 1; step < kParts; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
        // The sharers store in turn.
        if (r % kParts == part && n < outputs && first + r < tokens) finish(first + r, n, sum + own);
      }
    }
  }
  __syncthreads();
}

// A warp for each token. out may be x.
template <class T>
__device__ void norm(const float* x, float* out, const FormerSizes& s, int row, const T* weight,
                     const T* bias) {
  const int lane = threadIdx.x % 32;
  for (int t = threadIdx.x / 32; t < s.tokens; t += kThreads / 32) {
    float sum = 0;
    for (int c = lane; c < s.width; c += 32) sum += x[t * row + c];
    const float mean = warp_sum(sum) / s.width;
    float squares = 0;
    for (int c = lane; c < s.width; c += 32) {
      const float distance = x[t * row + c] - mean;
      squares += distance * distance;
    }
    const float scale = 1.0f / sqrtf(warp_sum(squares) / s.width + s.eps);
    for (int c = lane; c < s.width; c += 32) {
      out[t * row + c] = (x[t * row + c] - mean) * scale * widen(weight[c]) + widen(bias[c]);
    }
  }
  __syncthreads();
}

// out = softmax(q k^T / sqrt(depth)) v by heads; q, k and v in rows of `stride` floats.
__device__ inline void attend(const float* q, int q_stride, const float* k, const float* v, int stride,
                              float* weights, float* out, int row, const FormerSizes& s) {
  const int depth = s.width / s.heads, tokens = s.tokens;
  const float scale = 1.0f / sqrtf(static_cast<float>(depth));
  for (int i = threadIdx.x; i < s.heads * tokens * tokens; i += kThreads) {
    const int from = i % tokens, to = i / tokens % tokens, c = i / tokens / tokens * depth;
    float sum = 0;
    for (int j = 0; j < depth; ++j) sum += q[to * q_stride + c + j] * k[from * stride + c + j];
    weights[i] = sum * scale;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < s.heads * tokens; i += kThreads) {
    float* own = weights + i * tokens;
    float top = own[0], sum = 0;
    for (int j = 1; j < tokens; ++j) top = own[j] > top ? own[j] : top;
    for (int j = 0; j < tokens; ++j) sum += own[j] = expf(own[j] - top);
    for (int j = 0; j < tokens; ++j) own[j] /= sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tokens * s.width; i += kThreads) {
    const int t = i / s.width, c = i % s.width;
    const float* own = weights + (c / depth * tokens + t) * tokens;
    float sum = 0;
    for (int j = 0; j < tokens; ++j) sum += own[j] * v[j * stride + c];
    out[t * row + c] = sum;
  }
  __syncthreads();
}

// The Former, on the tokens in the first of the rooms.
template <class T>
__device__ void former(float* shared, const FormerRooms& rooms, const FormerWeights<T>& w,
                       const FormerSizes& s) {
  const int row = rooms.row, wide = rooms.wide;
  float *x = shared, *second = x + rooms.second, *between = x + rooms.between, *weights = x + rooms.weights;
  auto add_to_tokens = [&](int t, int n, float value) { x[t * row + n] += value; };
  auto put = [&](int t, int n, float value) { between[t * wide + n] = value; };
  const float* heard = x;  // what attention and the feed-forward network take
  if (s.standard) {
    norm(x, second, s, row, w.norm1_weight, w.norm1_bias);
    linear(second, row, s.tokens, s.width, w.qkv_weight, w.qkv_bias, 3 * s.width, put);
    attend(between, wide, between + s.width, between + 2 * s.width, wide, weights, second, row, s);
  } else {
    linear(x, row, s.tokens, s.width, w.qkv_weight, w.qkv_bias, s.width, put);
    attend(between, wide, x, x, row, weights, second, row, s);
  }
  linear(second, row, s.tokens, s.width, w.proj_weight, w.proj_bias, s.width, add_to_tokens);
  if (s.standard) {
    norm(x, second, s, row, w.norm2_weight, w.norm2_bias);
    heard = second;
  } else {
    norm(x, x, s, row, w.norm1_weight, w.norm1_bias);
  }
  if (s.ffn) {
    linear(heard, row, s.tokens, s.width, w.fc1_weight, w.fc1_bias, s.hidden, [&](int t, int n, float value) {
      put(t, n, value * 0.5f * (1.0f + erff(value * 0.70710678118654752f)));
    });
    linear(between, wide, s.tokens, s.hidden, w.fc2_weight, w.fc2_bias, s.width, add_to_tokens);
    if (!s.standard) norm(x, x, s, row, w.norm2_weight, w.norm2_bias);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    former_block_kernel(const T* tokens, T* result, FormerWeights<T> w, FormerSizes s) {
  MFK_DYNAMIC_SHARED(x);
  const FormerRooms rooms(s);
  const int64_t sample = static_cast<int64_t>(blockIdx.x) * s.tokens * s.width;
  for (int i = threadIdx.x; i < s.tokens * s.width; i += kThreads) {
    x[i / s.width * rooms.row + i % s.width] = widen(tokens[sample + i]);
  }
  __syncthreads();
  former(x, rooms, w, s);
  for (int i = threadIdx.x; i < s.tokens * s.width; i += kThreads) {
    result[sample + i] = narrow<T>(x[i / s.width * rooms.row + i % s.width]);
  }
}

}  // namespace cuda
}  // namespace mfk
