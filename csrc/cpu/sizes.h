// Counts that kernels and operators share. Always inlined: a copy of its own could be the one compiled for
// AVX-512.
#pragma once

#include <stdint.h>

namespace mfk {

// How many blocks of `size` hold `count` things.
inline __attribute__((always_inline)) int64_t blocks_of(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}
// Rows and channels in working memory are padded to a multiple of 16.
inline __attribute__((always_inline)) int64_t padded(int64_t n) { return blocks_of(n, 16) * 16; }

}  // namespace mfk
