// What a Mobile-Former block does with its tokens, but for the two attentions over pixels: the rest of the
// bridge from Mobile, the Former, the generators of the dynamic ReLUs, keys and values for the bridge back. A
// sample in one thread block.
#pragma once

#include <string.h>

#include "former_block.cuh"

namespace mfk {
namespace cuda {

struct ChainSizes {
  FormerSizes former;
  int inputs, outputs;                  // channels of the map before the block and behind it
  int units;                            // hidden ones of a generator
  int functions[2];                     // twice the channels of the maps for which coefficients are made
  int token;                            // of which they are made
  int64_t token_stride, sample_stride;  // of the tokens given
  int samples;
};

// Both generators' first layers are one matrix, keys and values another. gate_weight may be null.
template <class T>
struct ChainWeights {
  const T *gate_weight, *gate_bias, *bridge_weight, *bridge_bias, *norm_weight, *norm_bias;
  FormerWeights<T> former;
  const T *units_weight, *units_bias, *slopes_weight[2], *slopes_bias[2], *back_weight, *back_bias;
};

// sizes: samples, tokens, width, heads, hidden (0: no feed-forward network), inputs, outputs, units, both
// numbers of functions, token, token_stride, sample_stride.
inline ChainSizes chain_sizes(const int64_t* sizes, float eps) {
  const auto at = [&](int i) { return static_cast<int>(sizes[i]); };
  const FormerSizes former{at(1), at(2), at(3), at(4), false, at(4) > 0, eps};
  return {former, at(5), at(6), at(7), {at(8), at(9)}, at(10), sizes[11], sizes[12], at(0)};
}

// The weights, in their order, at offsets in what is packed; below zero: there is none.
constexpr int kChainWeights = 26;
template <class T>
ChainWeights<T> chain_weights(const T* packed, const int64_t* offsets) {
  const T* pointers[kChainWeights];
  for (int i = 0; i < kChainWeights; ++i) pointers[i] = offsets[i] < 0 ? nullptr : packed + offsets[i];
  ChainWeights<T> weights;
  static_assert(sizeof weights == sizeof pointers, "nothing but pointers");
  memcpy(&weights, pointers, sizeof weights);
  return weights;
}

__device__ inline float hardsigmoid(float value) {
  const float clipped = value + 3 < 0 ? 0 : value + 3 > 6 ? 6 : value + 3;  // NaN stays NaN
  return clipped / 6;
}

__host__ __device__ inline FormerRooms chain_rooms(const ChainSizes& s) {
  return FormerRooms(s.former, s.inputs > 2 * s.units ? s.inputs : 2 * s.units);
}

// tokens (T, B, d) by their strides; gathered (B, T, inputs), what the tokens took from the map; result
// (T, B, d); slopes (B, functions); back (2, B, T, outputs), keys and values.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    token_chain_kernel(const T* tokens, const T* gathered, T* result, T* slopes1, T* slopes2, T* back,
                       ChainWeights<T> w, ChainSizes s) {
  MFK_DYNAMIC_SHARED(x);
  const FormerRooms rooms = chain_rooms(s);
  const int row = rooms.row, wide = rooms.wide, count = s.former.tokens, width = s.former.width;
  const int64_t sample = blockIdx.x;
  float* between = x + rooms.between;
  for (int i = threadIdx.x; i < count * width; i += kThreads) {
    const int t = i / width, c = i % width;
    x[t * row + c] = widen(tokens[t * s.token_stride + sample * s.sample_stride + c]);
  }
  const T* given = gathered + sample * count * s.inputs;
  for (int i = threadIdx.x; i < count * s.inputs; i += kThreads) {
    between[i / s.inputs * wide + i % s.inputs] = widen(given[i]);
  }
  __syncthreads();
  if (w.gate_weight != nullptr) {
    linear(x, row, count, width, w.gate_weight, w.gate_bias, s.inputs,
           [&](int t, int n, float value) { between[t * wide + n] *= 2 * hardsigmoid(value); });
  }
  linear(between, wide, count, s.inputs, w.bridge_weight, w.bridge_bias, width,
         [&](int t, int n, float value) { x[t * row + n] += value; });
  norm(x, x, s.former, row, w.norm_weight, w.norm_bias);
  former(x, rooms, w.former, s.former);
  for (int i = threadIdx.x; i < count * width; i += kThreads) {
    const int t = i / width, c = i % width;
    result[(static_cast<int64_t>(t) * s.samples + sample) * width + c] = narrow<T>(x[t * row + c]);
  }
  linear<1>(x + s.token * row, row, 1, width, w.units_weight, w.units_bias, 2 * s.units,
            [&](int, int n, float value) { between[n] = value < 0 ? 0 : value; });
  T* slopes[] = {slopes1, slopes2};
  for (int i = 0; i < 2; ++i) {
    const int functions = s.functions[i];
    T* to = slopes[i] + sample * functions;
    linear<1>(between + i * s.units, wide, 1, s.units, w.slopes_weight[i], w.slopes_bias[i], functions,
              [&](int, int n, float value) {
                to[n] = narrow<T>(2 * hardsigmoid(value) - (2 * n < functions ? 0.0f : 1.0f));
              });
  }
  linear(x, row, count, width, w.back_weight, w.back_bias, 2 * s.outputs, [&](int t, int n, float value) {
    const int64_t at = n < s.outputs ? sample : s.samples + sample;
    back[(at * count + t) * s.outputs + n % s.outputs] = narrow<T>(value);
  });
}

}  // namespace cuda
}  // namespace mfk
