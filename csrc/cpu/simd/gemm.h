// Products of a run of positions (pixels or tokens; channels in the lanes) with weights; sums in float.
#pragma once

#include "gemm_operands.h"
#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)
#include "amx.h"
#elif defined(MFK_MMLA)
#include "mmla.h"
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace mfk {
namespace MFK_ISA {

// So many positions by so many vectors of outputs fit the registers. Of short vectors a whole panel's, since
// each is read with one load and each factor with another one.
#if defined(__aarch64__)
constexpr int kPositions = 6, kOutputVectors = 4;
#else
constexpr int kPositions = MFK_VECTOR_REGISTERS == 32 ? 14 : 6, kOutputVectors = 2;
#endif

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

#if MFK_INT8
// Products of 16 bits, added in pairs to 32.
MFK_INLINE mask<float> added_in_pairs(typename VectorOf<int16_t, 2 * kLanes<float>>::type a,
                                      typename VectorOf<int16_t, 2 * kLanes<float>>::type b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return reinterpret_cast<mask<float>>(
      _mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__) && !defined(__AVX512F__)
  return reinterpret_cast<mask<float>>(
      _mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  const mask<float> products = reinterpret_cast<mask<float>>(a * b);  // at most 255 * 128: they fit
  return ((products << 16) >> 16) + (products >> 16);
#endif
}
#endif

// Four bytes with four int8. No product, and no sum, is cut off: on all processors they are the same
// integers.
#if MFK_INT8
MFK_INLINE vec<float> multiply_add(const uint8_t* a, vec<float> b, vec<float> sum) {
  int32_t quad;
  memcpy(&quad, a, sizeof quad);
#if defined(__AVX512VNNI__)
  return reinterpret_cast<vec<float>>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sum), _mm512_set1_epi32(quad), reinterpret_cast<__m512i>(b)));
#elif defined(__AVXVNNI__)
  return reinterpret_cast<vec<float>>(_mm256_dpbusd_avx_epi32(
      reinterpret_cast<__m256i>(sum), _mm256_set1_epi32(quad), reinterpret_cast<__m256i>(b)));
#elif defined(__ARM_FEATURE_DOTPROD)
  return reinterpret_cast<vec<float>>(vdotq_s32(reinterpret_cast<int32x4_t>(sum),
                                                reinterpret_cast<int8x16_t>(vdupq_n_s32(quad)),
                                                reinterpret_cast<int8x16_t>(b)));
#else
  // Bytes at even and at odd places, as 16 bits.
  using half = typename VectorOf<int16_t, 2 * kLanes<float>>::type;
  using word = mask<float>;
  const half bytes = reinterpret_cast<half>(word{} + quad), weights = reinterpret_cast<half>(b);
  const half even = bytes & 255, even_weights = (weights << 8) >> 8, odd_weights = weights >> 8;
  const half odd = reinterpret_cast<half>(
      reinterpret_cast<typename VectorOf<uint16_t, 2 * kLanes<float>>::type>(bytes) >> 8);
  return reinterpret_cast<vec<float>>(reinterpret_cast<word>(sum) + added_in_pairs(even, even_weights) +
                                      added_in_pairs(odd, odd_weights));
#endif
}
#endif

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
    MFK_INLINE vec<float> activate(vec<float> y) const { return larger(vec<float>{}, y); }  // NaN for NaN
    MFK_INLINE vec<float> operator()(vec<float> y, int64_t) const { return activate(y); }
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

// relu6(y + 3) / 6
struct AddBiasHardsigmoid {
  const float* bias;
  struct At {
    vec<float> bias;
    MFK_INLINE vec<float> activate(vec<float> y) const { return relu6(y + 3.0f) / 6; }
    MFK_INLINE vec<float> operator()(vec<float> y, int64_t) const { return activate(y); }
  };
  MFK_INLINE At at(int64_t o) const { return {load(bias + o)}; }
};

MFK_INLINE vec<float> hardswish(vec<float> y) { return y * (relu6(y + 3.0f) * (1.0f / 6)); }

struct AddBiasHardswish {
  const float* bias;
  struct At {
    vec<float> bias;
    MFK_INLINE vec<float> activate(vec<float> y) const { return hardswish(y); }
    MFK_INLINE vec<float> operator()(vec<float> y, int64_t) const { return activate(y); }
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

// A sum of so many products is added to the total as one: long chains would gather rounding errors. Integers
// have none.
template <class T>
constexpr int64_t kLongestChain = kInteger<T> ? int64_t{1} << 40 : 256;

// Rows of weights that are fetched ahead where each is used once.
constexpr int64_t kFetchedRows = 32;

// Tiles of P positions by V vectors of outputs, from position `first` and output `o` on; a panel holds
// `panel` weights. Few positions would wait for each other's sums: they get several sums each, for every
// second or fourth input. Meanwhile the next panels are fetched by the first tiles, `fetched` by the others.
template <int P, int V, class T, class W, class Out, class Epilogue>
__attribute__((noinline)) void gemm_tiles(int64_t tiles, Rows<T> x, const W* w, int64_t panel, Out* out,
                                          int64_t out_stride, Epilogue epilogue, int64_t first, int64_t o,
                                          Fetched* fetched) {
  constexpr int n = kLanes<float>, kSums = P * V >= 8 ? 1 : (P * V >= 4 ? 2 : 4);
  constexpr int64_t kPanels = (V * n + kPanel - 1) / kPanel;
  const int64_t s = x.position, steps = blocks_of(x.run, kStep<T>);
  const bool once = tiles == 1;
  vec<float> lacking[V] = {};  // half of what bytes that are stored 128 less lack in each output's sum
  if constexpr (kInteger<T> && kSignedBytes) {
    const uint8_t half[] = {64, 64, 64, 64};
    for (int64_t row = 0; row < x.runs * steps; ++row) {
      unrolled<V>([&](auto v) __attribute__((always_inline)) {
        const W* weights = w + v * n / kPanel * panel + v * n % kPanel + row * kPanel;
        lacking[v] = multiply_add(half, load(weights), lacking[v]);
      });
    }
  }
  x.data += first * s;
  out += first * out_stride + o;
  for (int64_t number = 0; number < tiles; ++number, first += P, x.data += P * s, out += P * out_stride) {
    // All indices are constants: only so do these stay in registers.
    vec<float> sums[kSums * P * V] = {};
    float total[P * V * n];  // of the chains before this one, once there is one
    int64_t chains = 0;
    const char* soon;
    int64_t pace = kPanel * sizeof(W);
    if (once) {
      soon = reinterpret_cast<const char*>(w + kFetchedRows * kPanel);
    } else if (number < kPanels || fetched == nullptr || fetched->at >= fetched->end) {
      soon = reinterpret_cast<const char*>(w + (kPanels + number % kPanels) * panel);
    } else {
      soon = fetched->at;
      pace = fetched->pace;
      fetched->at += x.runs * steps * pace;
    }
    for (int64_t r = 0, length = 0; r < x.runs; ++r) {
      // Few pointers, three positions each: one for every position would not fit the integer registers.
      const T* base[(P + 2) / 3];
      unrolled<(P + 2) / 3>(
          [&](auto i) __attribute__((always_inline)) { base[i] = x.data + r * x.skip + 3 * i * s; });
      const W* row = w + r * steps * kPanel;
      auto step = [&](auto chain) __attribute__((always_inline)) {
        vec<float> b[V];
        unrolled<V>([&](auto v) __attribute__((always_inline)) {
          b[v] = load(row + v * n / kPanel * panel + v * n % kPanel);
        });
        __builtin_prefetch(soon, 0, 2);
        if (kPanels > 1 && once) __builtin_prefetch(soon + panel * sizeof(W), 0, 2);
        soon += pace;
        row += kPanel;
        unrolled<P>([&](auto p) __attribute__((always_inline)) {
          const T* a = &base[p / 3][p % 3 * s];
          unrolled<V>([&](auto v) __attribute__((always_inline)) {
            auto& sum = sums[(chain * P + p) * V + v];
            sum = multiply_add(a, b[v], sum);
          });
        });
        unrolled<(P + 2) / 3>([&](auto i) __attribute__((always_inline)) { base[i] += kStep<T>; });
      };
      const std::integral_constant<int, 0> one;
      for (int64_t c = 0; c < steps;) {
        if (length >= kLongestChain<T>) {
          unrolled<P * V>([&](auto i) __attribute__((always_inline)) {
            store(total + i * n, chains > 0 ? load(total + i * n) + sums[i] : sums[i]);
            sums[i] = vec<float>{};
          });
          ++chains;
          length = 0;
        }
        const int64_t rest = kLongestChain<T> - length, end = rest < steps - c ? c + rest : steps;
        length += end - c;
        if constexpr (kSums > 1) {
          for (; c + kSums <= end; c += kSums) unrolled<kSums>(step);
        }
        for (; c < end; ++c) step(one);
      }
    }
    if (chains > 0) {
      unrolled<P * V>([&](auto i) __attribute__((always_inline)) { sums[i] += load(total + i * n); });
    }
    unrolled<V>([&](auto v) __attribute__((always_inline)) {
      SumEnd<T> end(w + v * n / kPanel * panel + v * n % kPanel + x.runs * steps * kPanel);
      if constexpr (kInteger<T> && kSignedBytes) {
        end.start = add_sums<T>(end.start, add_sums<T>(lacking[v], lacking[v]));
      }
      with_finish(epilogue, o + v * n, [&](auto finish) __attribute__((always_inline)) {
        unrolled<P>([&](auto p) __attribute__((always_inline)) {
          constexpr int i = p * V + v;
          vec<float> sum = sums[i];
          unrolled<kSums - 1>([&](auto k) __attribute__((always_inline)) {
            sum = add_sums<T>(sum, sums[(k + 1) * P * V + i]);
          });
          store(out + p * out_stride + v * n, finish(end(sum) + finish.bias, first + p));
        });
      });
    });
  }
}

// Outputs `from` to `to` - 1, of which the first one's panel is at `w.data`, with so many rows. Weights stay
// in the first cache while the positions pass.
template <class T, class W, class Out, class Epilogue>
MFK_INLINE void vector_panels(int64_t positions, Rows<T> x, WeightsOf<W> w, int64_t rows, Out* out,
                              int64_t out_stride, Epilogue epilogue, int64_t from, int64_t to) {
  constexpr int n = kLanes<float>, most = kOutputVectors * n;
  const Tiles tiles(positions, kPositions);
  for (int64_t o = from; o < to;) {
    const int64_t panel = (rows + kLastRows<T>)*kPanel;
    const W* weights = w.data + (o - from) / kPanel * panel + o % kPanel;
    auto run = [&](auto vectors) __attribute__((always_inline)) {
      auto some = [&](int64_t size, int64_t count, int64_t first) __attribute__((always_inline)) {
        with_constant<kPositions>(size, [&](auto constant) __attribute__((always_inline)) {
          gemm_tiles<decltype(constant)::value, decltype(vectors)::value, T, W, Out, Epilogue>(
              count, x, weights, panel, out, out_stride, epilogue, first, o, w.fetched);
        });
      };
      some(tiles.size + 1, tiles.longer, 0);
      some(tiles.size, tiles.count - tiles.longer, tiles.longer * (tiles.size + 1));
      o += decltype(vectors)::value * n;
    };
    const bool many = to - o >= most;
    many ? run(std::integral_constant<int, kOutputVectors>()) : run(std::integral_constant<int, 1>());
  }
}

// The same by instructions for matrices, where there are any.
template <class T, class W, class Out, class Epilogue>
MFK_INLINE void gemm_panels(int64_t positions, Rows<T> x, WeightsOf<W> w, int64_t rows, Out* out,
                            int64_t out_stride, Epilogue epilogue, int64_t from, int64_t to) {
#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)
  if constexpr (kStep<T> > 1) {
    if (const int64_t steps = amx::steps_of_tile<T>(positions, x.run); steps > 0) {
      return amx::panels(positions, steps, x, w, rows, out, out_stride, epilogue, from, to);
    }
  }
#endif
#if defined(MFK_MMLA)
  if constexpr (kStep<T> > 1) {
    mmla::panels(positions, x, w, rows, out, out_stride, epilogue, from, to);
  } else
#endif
  {
    vector_panels(positions, x, w, rows, out, out_stride, epilogue, from, to);
  }
}

// out[p * out_stride + o] = epilogue(sum_i x(p, i) * w(i, o)) for p < positions.
template <class T, class W, class Out, class Epilogue>
void gemm(int64_t positions, Rows<T> x, WeightsOf<W> w, Out* out, int64_t out_stride, Epilogue epilogue) {
  const int64_t rows = x.runs * blocks_of(x.run, kStep<T>);
  gemm_panels(positions, x, w, rows, out, out_stride, epilogue, 0, w.outputs);
}

// The same where outputs are of groups, each with inputs of its own: a panel's weights are for the inputs of
// its outputs' groups alone, which are a part of each run. `w.outputs` is without padding.
template <class T, class Out, class Epilogue>
void gemm_groups(int64_t positions, Rows<T> x, int64_t groups, Weights w, Out* out, int64_t out_stride,
                 Epilogue epilogue) {
  const int64_t group_in = x.run / groups, group_out = w.outputs / groups;
  for (int64_t o = 0; o < w.outputs; o += kPanel) {
    const int64_t first = o / group_out,
                  last = (o + kPanel - 1 < w.outputs ? o + kPanel - 1 : w.outputs - 1) / group_out;
    const int64_t inputs = (last - first + 1) * group_in, rows = x.runs * blocks_of(inputs, kStep<T>);
    gemm_panels(positions, Rows<T>{x.data + first * group_in, x.position, x.runs, inputs, x.skip}, w, rows,
                out, out_stride, epilogue, o, o + kPanel);
    w.data += (rows + kLastRows<T>)*kPanel;
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
