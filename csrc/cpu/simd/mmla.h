// Products of bfloat16 and of int8 matrices by Arm's instructions for them: two positions by two outputs,
// over eight bytes of inputs.
#pragma once

#include "gemm_operands.h"

namespace mfk {
namespace MFK_ISA {
namespace mmla {

constexpr int kPositions = 6, kVectors = kPanel / kLanes<float>;

// sum(i, j) + the product of row i of x with row j of w; rows are halves.
MFK_INLINE vec<float> multiply_add(uint8x16_t x, vec<float> w, vec<float> sum) {
#if defined(MFK_STORED_BF16)
  return vbfmmlaq_f32(sum, vreinterpretq_bf16_u8(x), vreinterpretq_bf16_f32(w));
#else
  return reinterpret_cast<vec<float> >(
      vusmmlaq_s32(reinterpret_cast<int32x4_t>(sum), x, reinterpret_cast<int8x16_t>(w)));
#endif
}

// The inputs of two steps, or of one and zeros.
template <int kSteps>
MFK_INLINE uint8x8_t load_inputs(const void* from) {
  if (kSteps == 2) return vld1_u8(static_cast<const uint8_t*>(from));
  uint32_t word;
  memcpy(&word, from, sizeof word);
  return vcreate_u8(word);
}

// Tiles of P positions by a panel of outputs. Of an odd number the last one is multiplied twice.
template <int P, class T, class Out, class Epilogue>
__attribute__((noinline)) void tiles(int64_t count, Rows<T> x, const float* w, Out* out, int64_t out_stride,
                                     Epilogue epilogue, int64_t first, int64_t o) {
  constexpr int n = kLanes<float>, kPairs = (P + 1) / 2;
  const int64_t steps = blocks_of(x.run, kStep<T>);
  x.data += first * x.position;
  out += first * out_stride + o;
  for (; count > 0; --count, first += P, x.data += P * x.position, out += P * out_stride) {
    vec<float> sums[kPairs * 2 * kVectors] = {};  // of each pair two outputs side by side
    const float* row = w;
    for (int64_t r = 0; r < x.runs; ++r) {
      const T* base = x.data + r * x.skip;
      auto step = [&](auto some) __attribute__((always_inline)) {
        constexpr int kSteps = decltype(some)::value;
        uint8x16_t pairs[kPairs];
        unrolled<kPairs>([&](auto q) __attribute__((always_inline)) {
          const T* a = base + 2 * q * x.position;
          pairs[q] =
              vcombine_u8(load_inputs<kSteps>(a), load_inputs<kSteps>(2 * q + 1 < P ? a + x.position : a));
        });
        unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
          const vec<float> even = load(row + v * n),
                           odd = kSteps == 2 ? load(row + kPanel + v * n) : vec<float>{};
          const vec<float> columns[2] = {vzip1q_f32(even, odd), vzip2q_f32(even, odd)};
          unrolled<2 * kPairs>([&](auto i) __attribute__((always_inline)) {
            auto& sum = sums[(i / 2 * kVectors + v) * 2 + i % 2];
            sum = multiply_add(pairs[i / 2], columns[i % 2], sum);
          });
        });
        base += kSteps * kStep<T>;
        row += kSteps * kPanel;
      };
      int64_t c = 0;
      for (; c + 2 <= steps; c += 2) step(std::integral_constant<int, 2>());
      if (c < steps) step(std::integral_constant<int, 1>());
    }
    unrolled<kVectors>([&](auto v) __attribute__((always_inline)) {
      const SumEnd<T> end(row + v * n);
      with_finish(epilogue, o + v * n, [&](auto finish) __attribute__((always_inline)) {
        unrolled<P>([&](auto p) __attribute__((always_inline)) {
          const auto* pair = sums + (p / 2 * kVectors + v) * 2;
          const auto a = vreinterpretq_f64_f32(pair[0]), b = vreinterpretq_f64_f32(pair[1]);
          const vec<float> sum = vreinterpretq_f32_f64(p % 2 == 0 ? vzip1q_f64(a, b) : vzip2q_f64(a, b));
          store(out + p * out_stride + v * n, finish(end(sum) + finish.bias, first + p));
        });
      });
    });
  }
}

// As vector_panels of gemm.h.
template <class T, class Out, class Epilogue>
void panels(int64_t positions, Rows<T> x, Weights w, int64_t rows, Out* out, int64_t out_stride,
            Epilogue epilogue, int64_t from, int64_t to) {
  const Tiles all(positions, kPositions);
  for (int64_t o = from; o < to; o += kPanel) {
    const float* weights = w.data + (o - from) * (rows + kLastRows<T>);
    auto some = [&](int64_t size, int64_t count, int64_t first) {
      with_constant<kPositions>(size, [&](auto constant) {
        tiles<decltype(constant)::value>(count, x, weights, out, out_stride, epilogue, first, o);
      });
    };
    some(all.size + 1, all.longer, 0);
    some(all.size, all.count - all.longer, all.longer * (all.size + 1));
  }
}

}  // namespace mmla
}  // namespace MFK_ISA
}  // namespace mfk
