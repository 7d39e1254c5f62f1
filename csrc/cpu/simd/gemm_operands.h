// What a product of positions with weights is given.
#pragma once

#include "../sizes.h"
#include "elementary.h"

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
#elif defined(__aarch64__)
  // GCC 12 converts vectors of four lane by lane.
  int32_t bytes;
  memcpy(&bytes, p, sizeof bytes);
  const int16x8_t words = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(bytes)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)));
#else
  typename VectorOf<int8_t, kLanes<float>>::type bytes;
  memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, mask<float>), vec<float>);
#endif
}

// The last byte of floats from 2^23 to 2^24, which are integers.
MFK_INLINE void store(uint8_t* p, vec<float> v) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, reinterpret_cast<__m512i>(v));
  memcpy(p, &bytes, sizeof bytes);
#elif defined(__AVX2__)
  const __m256i firsts = _mm256_setr_epi32(0x0c080400, -1, -1, -1, 0x0c080400, -1, -1, -1);
  const __m256i halves = _mm256_shuffle_epi8(reinterpret_cast<__m256i>(v), firsts);
  const int32_t words[2] = {_mm_cvtsi128_si32(_mm256_castsi256_si128(halves)),
                            _mm_cvtsi128_si32(_mm256_extracti128_si256(halves, 1))};
  memcpy(p, words, sizeof words);
#elif defined(__aarch64__)
  const uint16x4_t words = vmovn_u32(reinterpret_cast<uint32x4_t>(v));
  const uint32_t bytes = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(words, words))), 0);
  memcpy(p, &bytes, sizeof bytes);
#else
  using word = typename VectorOf<uint32_t, kLanes<float>>::type;
  const auto bytes =
      __builtin_convertvector(reinterpret_cast<word>(v), typename VectorOf<uint8_t, kLanes<float>>::type);
  memcpy(p, &bytes, sizeof bytes);
#endif
}

// Whether networks in int8 run by this instruction set. Others run in the place of AVX-512 without VNNI, see
// MFK_DECLARE_INT8_KERNEL.
#if (defined(__AVX512F__) && !defined(__AVX512VNNI__)) || defined(MFK_STORED_BF16)
#define MFK_INT8 0
#else
#define MFK_INT8 1
#endif

// What maps and weights of a deployed network are stored as.
#if defined(MFK_STORED_BF16)
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

// Whether sums are integers, in the registers of floats: those of bytes with int8.
template <class T>
constexpr bool kInteger = std::is_same<T, uint8_t>::value;

#if MFK_INT8
// The integers of a vector's lanes as floats.
MFK_INLINE vec<float> from_integers(vec<float> v) {
#if defined(__AVX512F__)
  return reinterpret_cast<vec<float>>(_mm512_maskz_cvtepi32_ps(0xffff, reinterpret_cast<__m512i>(v)));
#elif defined(__AVX2__)
  return reinterpret_cast<vec<float>>(_mm256_cvtepi32_ps(reinterpret_cast<__m256i>(v)));
#else
  return __builtin_convertvector(reinterpret_cast<mask<float>>(v), vec<float>);
#endif
}
#endif

template <class T>
MFK_INLINE vec<float> add_sums(vec<float> a, vec<float> b) {
  if constexpr (kInteger<T>) {
    return reinterpret_cast<vec<float>>(reinterpret_cast<mask<float>>(a) + reinterpret_cast<mask<float>>(b));
  } else {
    return a + b;
  }
}

// Whether numbers that are rounded to bytes are stored 128 less: dot products of Arm take bytes with a sign.
#if defined(__ARM_FEATURE_DOTPROD) && !defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool kSignedBytes = true;
#else
constexpr bool kSignedBytes = false;
#endif

// Memory that is read later. A tile fetches `pace` bytes of it, at most 64, with each row of its weights.
struct Fetched {
  const char *at, *end;
  int64_t pace;
};

// The right side, (inputs, outputs) with outputs a multiple of 16, as packed by
// mfkernels/deploy/cpu/packing.py: panels of 16 outputs, in each the outputs of an input side by side. In
// bfloat16 two inputs of an output share the place of a float, of int8 four; a run whose length is no
// multiple of that ends with zeros.
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

// Of int8 matrices each panel ends with two rows: where the sums of its outputs begin, integers, and a factor
// of each.
template <class T>
constexpr int64_t kLastRows = kInteger<T> ? 2 : 0;

// What makes an output of a sum: of integers these two rows, of floats nothing.
template <class T>
struct SumEnd {
  vec<float> start{}, factor{};

  // From the place of a vector of outputs in the first of the two rows.
  template <class W>
  MFK_INLINE explicit SumEnd([[maybe_unused]] const W* rows) {
    if constexpr (kInteger<T>) {
      start = load(rows);
      factor = load(rows + kPanel);
    }
  }
  MFK_INLINE vec<float> operator()(vec<float> sum) const {
    if constexpr (kInteger<T>) {
      return from_integers(add_sums<T>(sum, start)) * factor;
    } else {
      return sum;
    }
  }
};

// Calls f with what an epilogue does to sums of the outputs from o on. Epilogues that choose it as the
// program runs have a function of this name of their own.
template <class Epilogue, class F>
MFK_INLINE void with_finish(const Epilogue& epilogue, int64_t o, F f) {
  f(epilogue.at(o));
}

// So many positions as tiles of nearly equal size, of at most `most`, rather than full ones and a small rest:
// the first `longer` ones have one position more.
struct Tiles {
  int64_t count, size, longer;
  MFK_INLINE Tiles(int64_t positions, int64_t most)
      : count(blocks_of(positions, most)), size(positions / count), longer(positions % count) {}
};

}  // namespace MFK_ISA
}  // namespace mfk
