// A thin vector layer over GCC's vector extensions (clang has them too): the kernels are written once and
// compiled once for every instruction set, each time in a namespace of its own.
//
// Kernel files must not instantiate templates of the standard library: the linker keeps one copy of such
// a function for the whole binary, and that copy could be the one compiled for AVX-512.
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

#include "../../task_memory.h"

#ifndef MFK_ISA
#error "MFK_ISA must be generic, avx2 or avx512: the build compiles this file once for each"
#endif

#if defined(__AVX512F__)
#include <immintrin.h>
#define MFK_VECTOR_BYTES 64
#define MFK_VECTOR_REGISTERS 32
#elif defined(__AVX2__)
#include <immintrin.h>
#define MFK_VECTOR_BYTES 32
#define MFK_VECTOR_REGISTERS 16
#elif defined(__aarch64__)
#include <arm_neon.h>
#define MFK_VECTOR_BYTES 16
#define MFK_VECTOR_REGISTERS 32
#else
#define MFK_VECTOR_BYTES 16  // SSE2
#define MFK_VECTOR_REGISTERS 16
#endif

// The copy for deployed networks in bfloat16.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define MFK_STORED_BF16
#endif
// Arm's instructions for matrices.
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) || defined(__ARM_FEATURE_MATMUL_INT8)
#define MFK_MMLA
#endif

#define MFK_INLINE inline __attribute__((always_inline))

namespace mfk {

// Storage only: kernels compute in float.
struct bf16 {
  uint16_t bits;
};

namespace MFK_ISA {

// The type in which a kernel computes on elements of type T.
template <class T>
struct ComputeType {
  using type = T;
};
template <>
struct ComputeType<bf16> {
  using type = float;
};
template <class T>
using compute_t = typename ComputeType<T>::type;

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
// A full vector of floats or doubles.
template <class C>
inline constexpr int kLanes = MFK_VECTOR_BYTES / sizeof(C);
template <class C>
using vec = typename VectorOf<C, kLanes<C>>::type;

template <class C>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};
// What a comparison of two vec<C> gives: all ones or all zeros in each lane.
template <class C>
using mask = typename VectorOf<typename IntegerOf<C>::type, kLanes<C>>::type;

template <class C>
MFK_INLINE vec<C> splat(C value) {
  return value - vec<C>{};  // minus, not plus: x - 0 is x even for x = -0, so it costs nothing
}

MFK_INLINE float to_compute(float value) { return value; }
MFK_INLINE double to_compute(double value) { return value; }
MFK_INLINE float to_compute(bf16 value) {
  uint32_t word = static_cast<uint32_t>(value.bits) << 16;
  float result;
  memcpy(&result, &word, sizeof result);
  return result;
}

// Full vectors; no alignment is assumed anywhere.
MFK_INLINE vec<float> load(const float* p) {
  vec<float> v;
  memcpy(&v, p, sizeof v);
  return v;
}
MFK_INLINE vec<double> load(const double* p) {
  vec<double> v;
  memcpy(&v, p, sizeof v);
  return v;
}
// GCC 12 converts vectors of sixteen in halves: five instructions for two. Of intrinsics without a mask it
// warns in its own header, so here and below they have one of all lanes.
#if defined(__AVX512F__)
MFK_INLINE vec<float> load(const bf16* p) {
  __m256i half;
  memcpy(&half, p, sizeof half);
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, half);
  return reinterpret_cast<vec<float>>(reinterpret_cast<VectorOf<uint32_t, 16>::type>(wide) << 16);
}
#elif defined(__aarch64__)
// GCC 12 converts vectors of four lane by lane.
MFK_INLINE vec<float> load(const bf16* p) {
  return reinterpret_cast<vec<float>>(vshll_n_u16(vld1_u16(&p->bits), 16));
}
#else
MFK_INLINE vec<float> load(const bf16* p) {
  typename VectorOf<uint16_t, kLanes<float>>::type half;
  memcpy(&half, p, sizeof half);
  using word = typename VectorOf<uint32_t, kLanes<float>>::type;
  return reinterpret_cast<vec<float>>(__builtin_convertvector(half, word) << 16);
}
#endif
MFK_INLINE void store(float* p, vec<float> v) { memcpy(p, &v, sizeof v); }
MFK_INLINE void store(double* p, vec<double> v) { memcpy(p, &v, sizeof v); }
#if defined(__AVX512BF16__)
// Of denormals it makes zeros.
MFK_INLINE void store(bf16* p, vec<float> v) {
  const __m256bh half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
  memcpy(p, &half, sizeof half);
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
MFK_INLINE void store(bf16* p, vec<float> v) {
  const bfloat16x4_t half = vcvt_bf16_f32(v);
  memcpy(p, &half, sizeof half);
}
#else
MFK_INLINE void store(bf16* p, vec<float> v) {
  using word = typename VectorOf<uint32_t, kLanes<float>>::type;
  word bits = reinterpret_cast<word>(v);
  word rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  rounded = v != v ? (word{} + 0x7fc0) : rounded;             // a NaN must not round to infinity
#if defined(__aarch64__)
  const auto half = vmovn_u32(reinterpret_cast<uint32x4_t>(rounded));
#else
  auto half = __builtin_convertvector(rounded, typename VectorOf<uint16_t, kLanes<float>>::type);
#endif
  memcpy(p, &half, sizeof half);
}
#endif

// All ones in the first n lanes.
template <class C>
MFK_INLINE mask<C> first_lanes(int64_t n) {
  using lane = typename IntegerOf<C>::type;
  mask<C> index;
  for (int i = 0; i < kLanes<C>; ++i) index[i] = i;
  return index < static_cast<lane>(n);
}

// The first n < kLanes lanes; the others are loaded as zero and not stored.
template <class T>
MFK_INLINE vec<compute_t<T>> load_part(const T* p, int64_t n) {
  T lanes[kLanes<compute_t<T>>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
MFK_INLINE void store_part(T* p, vec<compute_t<T>> v, int64_t n) {
  T lanes[kLanes<compute_t<T>>];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}
#if defined(__AVX512F__)
MFK_INLINE vec<float> load_part(const float* p, int64_t n) {
  return reinterpret_cast<vec<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p));
}
MFK_INLINE vec<double> load_part(const double* p, int64_t n) {
  return reinterpret_cast<vec<double>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p));
}
MFK_INLINE void store_part(float* p, vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m512>(v));
}
MFK_INLINE void store_part(double* p, vec<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), reinterpret_cast<__m512d>(v));
}
#elif defined(__AVX2__)
// Storing so would take as long as a store of each lane, on some processors longer.
MFK_INLINE vec<float> load_part(const float* p, int64_t n) {
  const auto inside = reinterpret_cast<__m256i>(first_lanes<float>(n));
  return reinterpret_cast<vec<float>>(_mm256_maskload_ps(p, inside));
}
MFK_INLINE vec<double> load_part(const double* p, int64_t n) {
  const auto inside = reinterpret_cast<__m256i>(first_lanes<double>(n));
  return reinterpret_cast<vec<double>>(_mm256_maskload_pd(p, inside));
}
#endif
template <class T>
MFK_INLINE vec<compute_t<T>> load_upto(const T* p, int64_t n) {
  return n >= kLanes<compute_t<T>> ? load(p) : load_part(p, n);
}
template <class T>
MFK_INLINE void store_upto(T* p, vec<compute_t<T>> v, int64_t n) {
  if (n >= kLanes<compute_t<T>>) {
    store(p, v);
  } else {
    store_part(p, v, n);
  }
}

template <class C>
MFK_INLINE void store_scalar(C* p, C value) {
  *p = value;
}
MFK_INLINE void store_scalar(bf16* p, float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  p->bits = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// a > b ? a : b and a < b ? a : b: b where one of them is NaN. One instruction, which GCC does not find for
// itself.
MFK_INLINE vec<float> larger(vec<float> a, vec<float> b) {
#if defined(__AVX512F__)
  return reinterpret_cast<vec<float>>(
      _mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<vec<float>>(
      _mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}
MFK_INLINE vec<float> smaller(vec<float> a, vec<float> b) {
#if defined(__AVX512F__)
  return reinterpret_cast<vec<float>>(
      _mm512_maskz_min_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<vec<float>>(
      _mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}

// NaN wins, as in torch.amax.
MFK_INLINE vec<float> maximum(vec<float> a, vec<float> b) { return a != a ? a : larger(a, b); }
MFK_INLINE vec<double> maximum(vec<double> a, vec<double> b) {
  const vec<double> larger = a > b ? a : b;
  return a != a ? a : larger;
}

// As doubles. GCC 12 makes five instructions of this one.
MFK_INLINE vec<double> widened(VectorOf<float, kLanes<double>>::type v) {
#if defined(__AVX512F__)
  return reinterpret_cast<vec<double>>(_mm512_maskz_cvtps_pd(0xff, reinterpret_cast<__m256>(v)));
#elif defined(__aarch64__)
  return reinterpret_cast<vec<double>>(vcvt_f64_f32(reinterpret_cast<float32x2_t>(v)));
#else
  return __builtin_convertvector(v, vec<double>);
#endif
}

// Sums over many pixels end in doubles: their error must not grow with the size of the map. `WideSum` holds
// one double for each lane of a vec<C>; sums of doubles keep what each addition rounds off (Knuth's sum of
// two numbers and its error).
template <class C>
struct WideSum;
template <>
struct WideSum<double> {
  vec<double> lanes{}, rest{};

  MFK_INLINE void add(vec<double> v) {
    const vec<double> sum = lanes + v, added = sum - lanes;
    rest += (lanes - (sum - added)) + (v - added);
    lanes = sum;
  }
  MFK_INLINE void add_product(vec<double> a, vec<double> b) { add(a * b); }
  MFK_INLINE void store_upto(double* p, int64_t n) const;
  // Where the sum is not finite, what was rounded off is not a number.
  MFK_INLINE vec<double> folded() const { return rest == rest ? lanes + rest : lanes; }
};
template <>
struct WideSum<float> {
  vec<double> low{}, high{};

  MFK_INLINE void add(vec<float> v) {
    typename VectorOf<float, kLanes<double>>::type half[2];
    memcpy(half, &v, sizeof v);
    low += widened(half[0]);
    high += widened(half[1]);
  }
  MFK_INLINE void add_product(vec<float> a, vec<float> b) {
    typename VectorOf<float, kLanes<double>>::type left[2], right[2];
    memcpy(left, &a, sizeof a);
    memcpy(right, &b, sizeof b);
    low += widened(left[0]) * widened(right[0]);
    high += widened(left[1]) * widened(right[1]);
  }
  MFK_INLINE void add_square(vec<float> v, double times) {
    typename VectorOf<float, kLanes<double>>::type half[2];
    memcpy(half, &v, sizeof v);
    const vec<double> first = widened(half[0]), second = widened(half[1]);
    low += times * first * first;
    high += times * second * second;
  }
  MFK_INLINE void store_upto(double* p, int64_t n) const;
  MFK_INLINE vec<double> folded() const { return low + high; }
};
MFK_INLINE void WideSum<double>::store_upto(double* p, int64_t n) const {
  MFK_ISA::store_upto(p, folded(), n);
}
MFK_INLINE void WideSum<float>::store_upto(double* p, int64_t n) const {
  MFK_ISA::store_upto(p, low, n);
  if (n > kLanes<double>) MFK_ISA::store_upto(p + kLanes<double>, high, n - kLanes<double>);
}

namespace detail {

// Every lane plus the one whose number differs in bit kStep.
template <int kStep, size_t... kLane>
MFK_INLINE vec<double> add_lanes(vec<double> v, std::index_sequence<kLane...>) {
#if defined(__clang__)
  return v + __builtin_shufflevector(v, v, (kLane ^ kStep)...);
#else
  return v + __builtin_shuffle(v, mask<double>{static_cast<int64_t>(kLane ^ kStep)...});
#endif
}

}  // namespace detail

template <int kStep = kLanes<double> / 2>
MFK_INLINE double sum_all(vec<double> v) {
  if constexpr (kStep == 0) {
    return v[0];
  } else {
    return sum_all<kStep / 2>(detail::add_lanes<kStep>(v, std::make_index_sequence<kLanes<double>>()));
  }
}
template <class C>
MFK_INLINE double sum_lanes(const WideSum<C>& sum) {
  return sum_all(sum.folded());
}
// Fewer and wider lanes with the same sum.
template <class C>
MFK_INLINE vec<double> wide_lanes(vec<C> v) {
  WideSum<C> sum;
  sum.add(v);
  return sum.folded();
}
template <class C>
MFK_INLINE double sum_lanes(vec<C> v) {
  return sum_all(wide_lanes<C>(v));
}

// The largest number; any of them where one is NaN.
template <class C>
MFK_INLINE C max_lanes(vec<C> v) {
  C lanes[kLanes<C>];
  store(lanes, v);
  for (int width = kLanes<C> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  }
  return lanes[0];
}

// The same value, which the compiler may not read from memory again for each use.
template <class V>
MFK_INLINE V in_register(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// Working memory of one task, not initialised. Buffers die in the reverse order of their making.
template <class C>
class Buffer {
 public:
  explicit Buffer(int64_t count) : bytes_(count * sizeof(C)), data_(static_cast<C*>(take_memory(bytes_))) {}
  ~Buffer() { give_memory(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator C*() { return data_; }

 private:
  size_t bytes_;
  C* data_;
};

// Calls f with `n`, from 1 to kMost, as a constant; for any other n it does nothing.
template <int kMost, class F>
MFK_INLINE void with_constant(int64_t n, F f) {
  if constexpr (kMost > 0) {
    if (n == kMost) {
      f(std::integral_constant<int, kMost>());
    } else {
      with_constant<kMost - 1>(n, f);
    }
  }
}

namespace detail {

template <class F, int... I>
MFK_INLINE void call_each([[maybe_unused]] F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>()), ...);
}

}  // namespace detail

// Calls f with each number below N, as a constant.
template <int N, class F>
MFK_INLINE void unrolled(F f) {
  detail::call_each(f, std::make_integer_sequence<int, N>());
}

MFK_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace MFK_ISA
}  // namespace mfk
