// Products of tiles by a warp: c (16, 8) += a (16, 16) b (16, 8), of which each thread holds a part, in pairs
// of numbers that lie side by side. Layout: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point
// type".
#pragma once

#include "device.cuh"

namespace mfk {
namespace cuda {

template <class T>
struct alignas(2 * sizeof(T)) Two {
  T first, second;
};

// The row and the first of two columns of c that this thread has in c[0] and c[1]; c[2] and c[3] are eight
// rows below.
__device__ inline int product_row() { return threadIdx.x % 32 / 4; }
__device__ inline int product_column() { return threadIdx.x % 4 * 2; }

// a from a matrix with rows of `row` numbers.
template <class T>
__device__ void load_rows(Two<T> (&a)[4], const T* from, int row) {
  for (int i = 0; i < 4; ++i) {
    const T* at = from + (product_row() + i % 2 * 8) * row + product_column() + i / 2 * 8;
    a[i] = *reinterpret_cast<const Two<T>*>(at);
  }
}

// b from a matrix whose rows are b's columns.
template <class T>
__device__ void load_columns(Two<T> (&b)[2], const T* from, int row) {
  for (int i = 0; i < 2; ++i) {
    b[i] = *reinterpret_cast<const Two<T>*>(from + product_row() * row + product_column() + i * 8);
  }
}

#ifdef MFK_EMULATED
template <class T>
void multiply_add(float (&c)[4], const Two<T> (&a)[4], const Two<T> (&b)[2]) {
  const int first = threadIdx.x / 32 * 32;
  struct Sent {
    const Two<T>*a, *b;
  } own{a, b};
  emulator::send(&own);
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    const int row = product_row(), column = product_column() + i % 2;
    sums[i] = 0;
    for (int k = 0; k < 16; ++k) {
      const auto& left =
          static_cast<const Sent*>(emulator::sent(first + 4 * row + k % 8 / 2))->a[k / 8 * 2 + i / 2];
      const auto& right = static_cast<const Sent*>(emulator::sent(first + 4 * column + k % 8 / 2))->b[k / 8];
      sums[i] +=
          widen(k % 2 == 0 ? left.first : left.second) * widen(k % 2 == 0 ? right.first : right.second);
    }
  }
  emulator::wait(emulator::kWarp);  // what was sent is read
  for (int i = 0; i < 4; ++i) c[i] += sums[i];
}
#else
template <class T>
__device__ inline unsigned bits(const Two<T>& two) {
  static_assert(sizeof(Two<T>) == sizeof(unsigned), "of half precision");
  unsigned result;
  memcpy(&result, &two, sizeof result);
  return result;
}
__device__ inline void multiply_add(float (&c)[4], const Two<__half> (&a)[4], const Two<__half> (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(bits(a[0])), "r"(bits(a[1])), "r"(bits(a[2])), "r"(bits(a[3])), "r"(bits(b[0])), "r"(bits(b[1])));
}
__device__ inline void multiply_add(float (&c)[4], const Two<__nv_bfloat16> (&a)[4],
                                    const Two<__nv_bfloat16> (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(bits(a[0])), "r"(bits(a[1])), "r"(bits(a[2])), "r"(bits(a[3])), "r"(bits(b[0])), "r"(bits(b[1])));
}
#endif

}  // namespace cuda
}  // namespace mfk
