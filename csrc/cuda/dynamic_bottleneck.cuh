// An inverted bottleneck with dynamic ReLUs for a tile of its output: 1x1 convolution, dynamic ReLU, 3x3
// depthwise convolution, dynamic ReLU, 1x1 convolution, and the bridge from the tokens. The wide maps between
// them are made kChunk channels at a time, for the tile and a halo of one pixel, and never leave the thread
// block. Products are of half precision, on tensor cores; sums and what follows them are float32.
#pragma once

#include <stdint.h>

#include "device.cuh"
#include "tensor_core.cuh"

namespace mfk {
namespace cuda {

constexpr int kBottleneckThreads = 256;
constexpr int kTile = 8;                              // rows and columns of a tile
constexpr int kHalo = kTile + 2;                      // ... with its border
constexpr int kHaloRows = (kHalo * kHalo + 15) / 16;  // its pixels, in rows of a product's tiles
constexpr int kChunk = 64;                            // hidden channels
constexpr int kPad = 8;                               // between rows, so that eight lie in different banks
constexpr int kHiddenRow = kChunk + kPad;
// Of a hidden channel: the bias and both slopes of either convolution, and its kernel.
enum Number { kBias1, kLow1, kHigh1, kBias2, kLow2, kHigh2, kKernel, kNumbers = kKernel + 9 };

struct BottleneckSizes {
  int inputs, hidden, outputs, height, width;
  bool skip;
};
struct MapStrides {
  int64_t sample, channel, row, column;
};

// slopes: (B, 2, hidden); weights in rows, (hidden, inputs), (hidden, 9), (outputs, hidden).
template <class T>
struct BottleneckWeights {
  const T *slopes1, *slopes2;
  const T *expand, *expand_bias, *depthwise, *depthwise_bias, *project, *project_bias;
};

// The bridge from the tokens: keys and values (B, tokens, outputs).
constexpr int kMostTokens = 8;
template <class T>
struct BridgeBack {
  const T *keys, *values;
  int tokens, heads;
};

// Shared memory, in bytes from its begin. The result takes the place of hidden, between and project.
template <class T>
struct BottleneckRooms {
  int input_row, input, expand, hidden, between, project, numbers, total;
  __host__ __device__ BottleneckRooms(const BottleneckSizes& s, int outputs) {
    const int size = sizeof(T);
    input_row = (s.inputs + 15) / 16 * 16 + kPad;
    input = 0;
    expand = input + 16 * kHaloRows * input_row * size;
    hidden = expand + kChunk * input_row * size;
    between = hidden + 16 * kHaloRows * kHiddenRow * size;
    project = between + kTile * kTile * kHiddenRow * size;
    numbers = project + outputs * kHiddenRow * size;
    total = numbers + kNumbers * kChunk * static_cast<int>(sizeof(float));
  }
};

// to (rows, padded), rows of `to_row`: a part (rows, columns) of a matrix with rows of `from_row`, and zeros.
template <class T>
__device__ void stage(T* to, int to_row, int rows, int padded, const T* from, int64_t from_row, int inside,
                      int columns) {
  constexpr int kWide = 16 / sizeof(T);
  struct alignas(16) Wide {
    T numbers[kWide];
  };
  if (columns % kWide == 0 && from_row % kWide == 0 && padded % kWide == 0) {
    const int wides = padded / kWide;
    for (int i = threadIdx.x; i < rows * wides; i += kBottleneckThreads) {
      const int row = i / wides, column = i % wides * kWide;
      Wide wide = {};
      if (row < inside && column < columns) {
        wide = *reinterpret_cast<const Wide*>(from + row * from_row + column);
      }
      *reinterpret_cast<Wide*>(to + row * to_row + column) = wide;
    }
    return;
  }
  for (int i = threadIdx.x; i < rows * padded; i += kBottleneckThreads) {
    const int row = i / padded, column = i % padded;
    const bool there = row < inside && column < columns;
    to[row * to_row + column] = there ? from[row * from_row + column] : narrow<T>(0.0f);
  }
}

// The tile with its halo, pixels in rows; zeros beside the map.
template <class T>
__device__ void load_halo(T* to, int to_row, const T* x, const MapStrides& at, const BottleneckSizes& s,
                          int top, int left) {
  const int padded = to_row - kPad, pixels = 16 * kHaloRows;
  // Neighbouring threads take what lies side by side.
  const bool channels_last = at.channel == 1;
  for (int i = threadIdx.x; i < pixels * padded; i += kBottleneckThreads) {
    const int pixel = channels_last ? i / padded : i % pixels, c = channels_last ? i % padded : i / pixels;
    const int row = top + pixel / kHalo, column = left + pixel % kHalo;
    const bool there = pixel < kHalo * kHalo && c < s.inputs && row >= 0 && row < s.height && column >= 0 &&
                       column < s.width;
    to[pixel * to_row + c] = there ? x[c * at.channel + row * at.row + column * at.column] : narrow<T>(0.0f);
  }
}

__device__ inline float dynamic_relu(float value, float low, float high) {
  const float one = low * value, other = high * value;
  return one > other || one != one ? one : other;  // NaN stays NaN
}

// h = dynamic ReLU of x expand^T + bias, zero beside the map and behind the last channel. A warp takes 16
// channels and every other row of tiles.
template <class T>
__device__ void expand_chunk(T* h, const T* x, const T* weights, int row, const float* numbers,
                             const BottleneckSizes& s, int channels, int top, int left) {
  constexpr int kShare = (kHaloRows + 1) / 2;
  const int warp = threadIdx.x / 32, first = 16 * (warp % 4), half = warp / 4;
  float sums[kShare][2][4] = {};
  for (int k = 0; k < row - kPad; k += 16) {
    Two<T> b[2][2];
    for (int n = 0; n < 2; ++n) load_columns(b[n], weights + (first + 8 * n) * row + k, row);
#pragma unroll
    for (int m = 0; m < kShare; ++m) {
      const int tile = 2 * m + half;
      if (tile >= kHaloRows) break;
      Two<T> a[4];
      load_rows(a, x + 16 * tile * row + k, row);
      for (int n = 0; n < 2; ++n) multiply_add(sums[m][n], a, b[n]);
    }
  }
#pragma unroll
  for (int m = 0; m < kShare; ++m) {
    const int tile = 2 * m + half;
    if (tile >= kHaloRows) break;
    for (int below = 0; below < 2; ++below) {
      const int pixel = 16 * tile + 8 * below + product_row();
      const int y = top + pixel / kHalo, z = left + pixel % kHalo;
      const bool there = y >= 0 && y < s.height && z >= 0 && z < s.width;
      for (int n = 0; n < 2; ++n) {
        const int c = first + 8 * n + product_column();
        Two<T> two;
        for (int i = 0; i < 2; ++i) {
          const float value = sums[m][n][2 * below + i] + numbers[kBias1 * kChunk + c + i];
          const float bent =
              dynamic_relu(value, numbers[kLow1 * kChunk + c + i], numbers[kHigh1 * kChunk + c + i]);
          (i == 0 ? two.first : two.second) = narrow<T>(there && c + i < channels ? bent : 0.0f);
        }
        *reinterpret_cast<Two<T>*>(h + pixel * kHiddenRow + c) = two;
      }
    }
  }
}

// d = dynamic ReLU of the depthwise convolution of h. A warp takes a column, its threads two channels each.
template <class T>
__device__ void convolve_chunk(T* d, const T* h, const float* numbers) {
  const int column = threadIdx.x / 32, c = 2 * (threadIdx.x % 32);
  float kernel[9][2], seen[3][3][2];  // seen: the rows that are still needed
  for (int i = 0; i < 9; ++i) {
    for (int j = 0; j < 2; ++j) kernel[i][j] = numbers[(kKernel + i) * kChunk + c + j];
  }
  const auto load = [&](int row, float (&to)[3][2]) {
    for (int i = 0; i < 3; ++i) {
      const auto two = *reinterpret_cast<const Two<T>*>(h + (row * kHalo + column + i) * kHiddenRow + c);
      to[i][0] = widen(two.first), to[i][1] = widen(two.second);
    }
  };
  load(0, seen[0]);
  load(1, seen[1]);
#pragma unroll
  for (int row = 0; row < kTile; ++row) {
    load(row + 2, seen[(row + 2) % 3]);
    Two<T> two;
    for (int j = 0; j < 2; ++j) {
      float sum = numbers[kBias2 * kChunk + c + j];
      for (int i = 0; i < 9; ++i) sum += seen[(row + i / 3) % 3][i % 3][j] * kernel[i][j];
      const float bent = dynamic_relu(sum, numbers[kLow2 * kChunk + c + j], numbers[kHigh2 * kChunk + c + j]);
      (j == 0 ? two.first : two.second) = narrow<T>(bent);
    }
    *reinterpret_cast<Two<T>*>(d + (row * kTile + column) * kHiddenRow + c) = two;
  }
}

// y + the attention of its pixels to the tokens, in place. Four threads share a pixel, and each has every
// fourth channel.
template <class T>
__device__ void bridge_back(T* y, int row, const BridgeBack<T>& bridge, int64_t sample, int channels) {
  const int depth = channels / bridge.heads, part = threadIdx.x % 4, tokens = bridge.tokens;
  const float scale = 1.0f / sqrtf(static_cast<float>(depth));
  T* own = y + threadIdx.x / 4 * row;
  for (int head = 0; head < bridge.heads; ++head) {
    const int first = head * depth;
    const int64_t at = sample * tokens * channels + first;
    float weights[kMostTokens] = {};
    for (int c = part; c < depth; c += 4) {
      const float value = widen(own[first + c]);
#pragma unroll
      for (int t = 0; t < kMostTokens; ++t) {
        if (t < tokens) weights[t] += value * widen(bridge.keys[at + t * channels + c]);
      }
    }
    float top = 0, sum = 0;
#pragma unroll
    for (int t = 0; t < kMostTokens; ++t) {
      for (int step = 1; step < 4; step *= 2) weights[t] += __shfl_xor_sync(~0u, weights[t], step);
      weights[t] *= scale;
      if (t < tokens) top = t == 0 || weights[t] > top ? weights[t] : top;
    }
#pragma unroll
    for (int t = 0; t < kMostTokens; ++t) {
      weights[t] = t < tokens ? expf(weights[t] - top) : 0;
      sum += weights[t];
    }
    for (int c = part; c < depth; c += 4) {
      float value = 0;
#pragma unroll
      for (int t = 0; t < kMostTokens; ++t) {
        if (t < tokens) value += weights[t] * widen(bridge.values[at + t * channels + c]);
      }
      own[first + c] = narrow<T>(widen(own[first + c]) + value / sum);
    }
  }
}

// A block for each tile of each sample, tiles first. Outputs: at most 16 kColumns; a warp has 16 pixels and
// half of the outputs.
template <class T, int kColumns>
__global__ void __launch_bounds__(kBottleneckThreads, kColumns > 8 ? 1 : 2)
    dynamic_bottleneck_kernel(const T* x, MapStrides x_at, T* result, MapStrides result_at,
                              BottleneckWeights<T> w, BridgeBack<T> bridge, BottleneckSizes s) {
  MFK_DYNAMIC_SHARED(shared);
  char* memory = reinterpret_cast<char*>(shared);
  const BottleneckRooms<T> rooms(s, 16 * kColumns);
  T *input = reinterpret_cast<T*>(memory + rooms.input),
    *expand = reinterpret_cast<T*>(memory + rooms.expand);
  T *hidden = reinterpret_cast<T*>(memory + rooms.hidden),
    *project = reinterpret_cast<T*>(memory + rooms.project);
  T* between = reinterpret_cast<T*>(memory + rooms.between);
  float* numbers = reinterpret_cast<float*>(memory + rooms.numbers);

  const int across = (s.width + kTile - 1) / kTile, tiles = across * ((s.height + kTile - 1) / kTile);
  const int64_t sample = blockIdx.x / tiles;
  const int tile = blockIdx.x % tiles, top = tile / across * kTile, left = tile % across * kTile;
  load_halo(input, rooms.input_row, x + sample * x_at.sample, x_at, s, top - 1, left - 1);

  const int warp = threadIdx.x / 32, own_row = 16 * (warp % 4), own_column = 8 * kColumns * (warp / 4);
  float sums[kColumns][4] = {};
  for (int start = 0; start < s.hidden; start += kChunk) {
    const int channels = s.hidden - start < kChunk ? s.hidden - start : kChunk;
    if (start > 0) __syncthreads();  // all have used what comes next into its place
    stage(expand, rooms.input_row, kChunk, rooms.input_row - kPad,
          w.expand + static_cast<int64_t>(start) * s.inputs, s.inputs, channels, s.inputs);
    stage(project, kHiddenRow, 16 * kColumns, kChunk, w.project + start, s.hidden, s.outputs, channels);
    for (int i = threadIdx.x; i < kNumbers * kChunk; i += kBottleneckThreads) {
      const int kind = i / kChunk, c = i % kChunk;
      const T* from = w.depthwise + static_cast<int64_t>(start + c) * 9 + (kind - kKernel);
      const int64_t slopes = sample * 2 * s.hidden + start + c;
      if (kind == kBias1) from = w.expand_bias + start + c;
      if (kind == kLow1) from = w.slopes1 + slopes;
      if (kind == kHigh1) from = w.slopes1 + slopes + s.hidden;
      if (kind == kBias2) from = w.depthwise_bias + start + c;
      if (kind == kLow2) from = w.slopes2 + slopes;
      if (kind == kHigh2) from = w.slopes2 + slopes + s.hidden;
      numbers[i] = c < channels ? widen(*from) : 0.0f;
    }
    __syncthreads();
    expand_chunk(hidden, input, expand, rooms.input_row, numbers, s, channels, top - 1, left - 1);
    __syncthreads();
    convolve_chunk(between, hidden, numbers);
    __syncthreads();
    for (int k = 0; k < kChunk; k += 16) {
      Two<T> a[4];
      load_rows(a, between + own_row * kHiddenRow + k, kHiddenRow);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        if (own_column + 8 * n >= s.outputs) break;
        Two<T> b[2];
        load_columns(b, project + (own_column + 8 * n) * kHiddenRow + k, kHiddenRow);
        multiply_add(sums[n], a, b);
      }
    }
  }
  __syncthreads();
  T* y = hidden;
  const int y_row = (s.outputs + 15) / 16 * 16 + kPad;
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    for (int i = 0; i < 4; ++i) {
      const int pixel = own_row + 8 * (i / 2) + product_row();
      const int c = own_column + 8 * n + product_column() + i % 2;
      if (c >= s.outputs) continue;
      float value = sums[n][i] + widen(w.project_bias[c]);
      const int inner = (pixel / kTile + 1) * kHalo + pixel % kTile + 1;
      if (s.skip) value += widen(input[inner * rooms.input_row + c]);
      y[pixel * y_row + c] = narrow<T>(value);
    }
  }
  __syncthreads();
  bridge_back(y, y_row, bridge, sample, s.outputs);
  __syncthreads();
  result += sample * result_at.sample;
  const bool channels_last = result_at.channel == 1;  // neighbouring threads write what lies side by side
  for (int i = threadIdx.x; i < kTile * kTile * s.outputs; i += kBottleneckThreads) {
    const int pixel = channels_last ? i / s.outputs : i % (kTile * kTile);
    const int c = channels_last ? i % s.outputs : i / (kTile * kTile);
    const int row = top + pixel / kTile, column = left + pixel % kTile;
    if (row >= s.height || column >= s.width) continue;
    result[c * result_at.channel + row * result_at.row + column * result_at.column] = y[pixel * y_row + c];
  }
}

}  // namespace cuda
}  // namespace mfk
