// What a product of positions with weights is given.
#pragma once

#include "elementary.h"
#include "sizes.h"

namespace mfk {
namespace MFK_ISA {

MFK_INLINE vec<float> load(const int8_t* p) {
#if defined(__AVX512F__)
  __m128i bytes;
  memcpy(&bytes, p, sizeof bytes);
  return reinterpret_cast<vec<float>>(
      _mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bytes)));
#elif defined(__AVX2__)
  return reinterpret_cast<vec<float>>(
      _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#else
  typename VectorOf<int8_t, kLanes<float>>::type bytes;
  memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, mask<float>), vec<float>);
#endif
}

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

// Memory that is read later. A tile fetches `pace` bytes of it, at most 64, with each row of its weights.
struct Fetched {
  const char *at, *end;
  int64_t pace;
};

// The right side, (inputs, outputs) with outputs a multiple of 16, as packed by mfkernels/deploy/packing.py:
// panels of 16 outputs, in each the outputs of an input side by side. In bfloat16 two inputs of an output
// share the place of a float; a run of odd length ends with a zero.
constexpr int64_t kPanel = 16;
// `fetched`: what is fetched meanwhile, or null. Narrow ones, W, are widened in registers; bfloat16 among
// them lies as float does, without pairs.
template <class W>
struct WeightsOf {
  const W* data;
  int64_t outputs;
  Fetched* fetched = nullptr;
};
using Weights = WeightsOf<float>;
MFK_INLINE int64_t weight_rows(int64_t inputs) { return blocks_of(inputs, kStep<Stored>); }

// So many positions as tiles of nearly equal size, of at most `most`, rather than full ones and a small rest:
// the first `longer` ones have one position more.
struct Tiles {
  int64_t count, size, longer;
  MFK_INLINE Tiles(int64_t positions, int64_t most)
      : count(blocks_of(positions, most)), size(positions / count), longer(positions % count) {}
};

}  // namespace MFK_ISA
}  // namespace mfk
