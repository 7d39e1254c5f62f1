// Products of a run of positions (pixels or tokens; channels in the lanes) with weights; sums in float.
#pragma once

#include "elementary.h"
#include "sizes.h"

namespace mfk {
namespace MFK_ISA {

// So many positions by two vectors of outputs fit the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPositions = 14;
#else
constexpr int kPositions = 6;
#endif

// What maps and weights of a deployed network are stored as.
#if defined(__AVX512BF16__)
using Stored = bf16;
#else
using Stored = float;
#endif

// The left side: element (p, r * run + c) at data[p * position + r * skip + c], for c < run, r < runs.
template <class T>
struct Rows {
  const T* data;
  int64_t position, runs, run, skip;
};

// Inputs of type T that are multiplied in one step.
template <class T>
constexpr int64_t kStep = sizeof(float) / sizeof(T);

MFK_INLINE vec<float> multiply_add(const float* a, vec<float> b, vec<float> sum) {
  return sum + splat(*a) * b;
}
#if defined(__AVX512BF16__)
// Pairs of bfloat16; neither products nor their sum are rounded to it.
MFK_INLINE vec<float> multiply_add(const bf16* a, vec<float> b, vec<float> sum) {
  int32_t pair;
  memcpy(&pair, a, sizeof pair);
  return reinterpret_cast<vec<float>>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                       reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)),
                                                       reinterpret_cast<__m512bh>(b)));
}
#endif

// The right side, (inputs, outputs) with outputs a multiple of 16, as packed by mfkernels/deploy/packing.py:
// panels of 32 outputs (the last one may have 16), in each the outputs of an input side by side. In
// bfloat16 two inputs of an output share the place of a float; a run of odd length ends with a zero.
struct Weights {
  const float* data;
  int64_t outputs;
};
MFK_INLINE int64_t weight_rows(int64_t inputs) { return blocks_of(inputs, kStep<Stored>); }

// What is done to a sum before it is stored. `at(o)` loads what depends on the output alone: the bias, which
// is added last (a large one would round every product), and what its operator, called with the whole sum,
// needs.
struct AddBias {
  const float* bias;
  struct At {
    vec<float> bias;
    MFK_INLINE vec<float> activate(vec<float> y) const { return y; }
    MFK_INLINE vec<float> operator()(vec<float> y, int64_t) const { return activate(y); }
  };
  MFK_INLINE At at(int64_t o) const { return {load(bias + o)}; }
};

// min(max(y, 0), 6), and NaN for NaN
MFK_INLINE vec<float> relu6(vec<float> y) { return smaller(splat(6.0f), larger(vec<float>{}, y)); }

struct AddBiasRelu6 {
  const float* bias;
  struct At {
    vec<float> bias;
    MFK_INLINE vec<float> activate(vec<float> y) const { return relu6(y); }
    MFK_INLINE vec<float> operator()(vec<float> y, int64_t) const { return activate(y); }
  };
  MFK_INLINE At at(int64_t o) const { return {load(bias + o)}; }
};

// max(a y, b y) of y = sum + bias: the larger slope counts where y is positive.
struct AddBiasDynamicRelu {
  const float *bias, *larger, *smaller;
  struct At {
    vec<float> bias, larger, smaller;
    MFK_INLINE vec<float> activate(vec<float> y) const { return y * (y > 0 ? larger : smaller); }
    MFK_INLINE vec<float> operator()(vec<float> y, int64_t) const { return activate(y); }
  };
  MFK_INLINE At at(int64_t o) const { return {load(bias + o), load(larger + o), load(smaller + o)}; }
};

// factor * relu6(sum + bias)
struct AddBiasScaledRelu6 {
  const float *bias, *factor;
  struct At {
    vec<float> bias, factor;
    MFK_INLINE vec<float> activate(vec<float> y) const { return factor * relu6(y); }
    MFK_INLINE vec<float> operator()(vec<float> y, int64_t) const { return activate(y); }
  };
  MFK_INLINE At at(int64_t o) const { return {load(bias + o), load(factor + o)}; }
};

struct AddBiasRelu {
  const float* bias;
  struct At {
    vec<float> bias;
    MFK_INLINE vec<float> operator()(vec<float> y, int64_t) const {
      return larger(vec<float>{}, y);  // NaN for NaN
    }
  };
  MFK_INLINE At at(int64_t o) const { return {load(bias + o)}; }
};

// 2 hardsigmoid(sum + bias), where hardsigmoid(y) = relu6(y + 3) / 6
struct AddBiasTwoHardsigmoid {
  const float* bias;
  struct At {
    vec<float> bias;
    MFK_INLINE vec<float> operator()(vec<float> y, int64_t) const { return relu6(y + 3.0f) / 3; }
  };
  MFK_INLINE At at(int64_t o) const { return {load(bias + o)}; }
};

MFK_INLINE vec<float> hardswish(vec<float> y) { return y * relu6(y + 3.0f) / 6; }

struct AddBiasHardswish {
  const float* bias;
  struct At {
    vec<float> bias;
    MFK_INLINE vec<float> operator()(vec<float> y, int64_t) const { return hardswish(y); }
  };
  MFK_INLINE At at(int64_t o) const { return {load(bias + o)}; }
};

struct AddBiasGelu {
  const float* bias;
  struct At {
    vec<float> bias;
    MFK_INLINE vec<float> activate(vec<float> y) const { return gelu(y); }
    MFK_INLINE vec<float> operator()(vec<float> y, int64_t) const { return activate(y); }
  };
  MFK_INLINE At at(int64_t o) const { return {load(bias + o)}; }
};

// sum + bias + residual[p * stride + o]
template <class T>
struct AddResidual {
  const float* bias;
  const T* residual;
  int64_t stride;
  struct At {
    vec<float> bias;
    const T* residual;
    int64_t stride;
    MFK_INLINE vec<float> operator()(vec<float> y, int64_t p) const {
      return y + load(residual + p * stride);
    }
  };
  MFK_INLINE At at(int64_t o) const { return {load(bias + o), residual + o, stride}; }
};

// A sum of so many products is added to the total as one: long chains would gather rounding errors.
constexpr int64_t kLongestChain = 256;

// Tiles of P positions by V vectors of outputs, from position `first` and output `o` on. Few positions would
// wait for each other's sums: they get several sums each, for every second or fourth input.
template <int P, int V, class T, class Out, class Epilogue>
__attribute__((noinline)) void gemm_tiles(int64_t tiles, Rows<T> x, const float* w, int64_t w_stride,
                                          Out* out, int64_t out_stride, Epilogue epilogue, int64_t first,
                                          int64_t o) {
  constexpr int n = kLanes<float>;
  constexpr int kSums = P * V >= 8 ? 1 : (P * V >= 4 ? 2 : 4);
  const int64_t s = x.position, steps = blocks_of(x.run, kStep<T>);
  x.data += first * s;
  out += first * out_stride + o;
  for (; tiles > 0; --tiles, first += P, x.data += P * s, out += P * out_stride) {
    vec<float> acc[kSums][P][V] = {};
    vec<float> total[P][V];  // of the chains before this one, once there is one
    int64_t chains = 0;
    for (int64_t r = 0, length = 0; r < x.runs; ++r) {
      // Few pointers, three positions each: one for every position would not fit the integer registers.
      const T* base[(P + 2) / 3];
      for (int i = 0; i < (P + 2) / 3; ++i) base[i] = x.data + r * x.skip + 3 * i * s;
      const float* row = w + r * steps * w_stride;
      auto step = [&](vec<float>(&sums)[P][V]) __attribute__((always_inline)) {
        vec<float> b[V];
        for (int v = 0; v < V; ++v) b[v] = load(row + v * n);
        row += w_stride;
        for (int p = 0; p < P; ++p) {
          const T* a = &base[p / 3][(p % 3) * s];
          for (int v = 0; v < V; ++v) sums[p][v] = multiply_add(a, b[v], sums[p][v]);
        }
        for (int i = 0; i < (P + 2) / 3; ++i) base[i] += kStep<T>;
      };
      for (int64_t c = 0; c < steps;) {
        if (length >= kLongestChain) {
          for (int p = 0; p < P; ++p) {
            for (int v = 0; v < V; ++v) {
              total[p][v] = chains > 0 ? total[p][v] + acc[0][p][v] : acc[0][p][v];
              acc[0][p][v] = vec<float>{};
            }
          }
          ++chains;
          length = 0;
        }
        const int64_t end = c + kLongestChain < steps ? c + kLongestChain : steps;
        length += end - c;
        if constexpr (kSums > 1) {
          for (; c + kSums <= end; c += kSums) {
            for (int k = 0; k < kSums; ++k) step(acc[k]);
          }
        }
        for (; c < end; ++c) step(acc[0]);
      }
    }
    for (int v = 0; v < V; ++v) {
      const auto finish = epilogue.at(o + v * n);
      for (int p = 0; p < P; ++p) {
        vec<float> sum = acc[0][p][v];
        if (chains > 0) sum += total[p][v];
        for (int k = 1; k < kSums; ++k) sum += acc[k][p][v];
        store(out + p * out_stride + v * n, finish(sum + finish.bias, first + p));
      }
    }
  }
}

// So many positions as tiles of nearly equal size rather than full ones and a small rest: the first `longer`
// ones have one position more.
struct Tiles {
  int64_t count, size, longer;
  MFK_INLINE explicit Tiles(int64_t positions)
      : count(blocks_of(positions, kPositions)), size(positions / count), longer(positions % count) {}
};

// `width` outputs from `o` on, 16 or 32, whose weights are `w`.
template <class T, class Out, class Epilogue>
MFK_INLINE void gemm_panel(Tiles tiles, Rows<T> x, const float* w, int64_t width, Out* out,
                           int64_t out_stride, Epilogue epilogue, int64_t o) {
  constexpr int n = kLanes<float>;
  auto run = [&](auto vectors, int64_t positions, int64_t count, int64_t first, int64_t i)
                 __attribute__((always_inline)) {
                   with_constant<kPositions>(positions, [&](auto size) __attribute__((always_inline)) {
                     gemm_tiles<decltype(size)::value, decltype(vectors)::value, T, Out, Epilogue>(
                         count, x, w + i, width, out, out_stride, epilogue, first, o + i);
                   });
                 };
  for (int64_t i = 0; i < width;) {
    auto both = [&](auto vectors) __attribute__((always_inline)) {
      run(vectors, tiles.size + 1, tiles.longer, 0, i);
      run(vectors, tiles.size, tiles.count - tiles.longer, tiles.longer * (tiles.size + 1), i);
      i += decltype(vectors)::value * n;
    };
    width - i >= 2 * n ? both(std::integral_constant<int, 2>()) : both(std::integral_constant<int, 1>());
  }
}

// out[p * out_stride + o] = epilogue(sum_i x(p, i) * w(i, o)) for p < positions. Weights stay in the first
// cache while the positions pass.
template <class T, class Out, class Epilogue>
void gemm(int64_t positions, Rows<T> x, Weights w, Out* out, int64_t out_stride, Epilogue epilogue) {
  const int64_t rows = x.runs * blocks_of(x.run, kStep<T>);  // of weights
  for (int64_t o = 0; o < w.outputs; o += 32) {
    const int64_t width = w.outputs - o < 32 ? w.outputs - o : 32;
    gemm_panel(Tiles(positions), x, w.data + o * rows, width, out, out_stride, epilogue, o);
  }
}

// The same where outputs are of groups, each with inputs of its own: panels of 16 outputs, whose weights are
// for the inputs of their groups alone. `outputs` is without padding.
template <class T, class Out, class Epilogue>
void gemm_groups(int64_t positions, Rows<T> x, int64_t groups, int64_t outputs, const float* w, Out* out,
                 int64_t out_stride, Epilogue epilogue) {
  const int64_t group_in = x.run / groups, group_out = outputs / groups;
  for (int64_t o = 0; o < outputs; o += 16) {
    const int64_t first = o / group_out, last = (o + 15 < outputs ? o + 15 : outputs - 1) / group_out;
    const int64_t inputs = (last - first + 1) * group_in;
    gemm_panel(Tiles(positions), Rows<T>{x.data + first * group_in, x.position, 1, inputs, 0}, w, 16, out,
               out_stride, epilogue, o);
    w += weight_rows(inputs) * 16;
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
