// Products of bfloat16 and of int8 matrices by AMX: tiles of positions, a panel of outputs and steps: pairs
// of inputs in bfloat16, four of them as bytes.
#pragma once

#include "../../isa.h"
#include "gemm_operands.h"

namespace mfk {
namespace MFK_ISA {
namespace amx {

// What LDTILECFG reads: bytes in a row and rows of each tile. Tiles 0 to 3 are sums, 4 and 5 positions, 6 and
// 7 weights.
struct Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// `positions` rows and `steps` steps, each at most 16.
MFK_INLINE void configure(int64_t positions, int64_t steps) {
  Config config;
  auto set = [&](int tile, int64_t rows, int64_t bytes) {
    config.rows[tile] = static_cast<uint8_t>(rows);
    config.bytes[tile] = static_cast<uint16_t>(bytes);
  };
  for (int tile = 0; tile < 4; ++tile) set(tile, positions, 64);
  for (int tile = 4; tile < 6; ++tile) set(tile, positions, 4 * steps);
  for (int tile = 6; tile < 8; ++tile) set(tile, steps, 64);
  asm volatile("ldtilecfg %0" : : "m"(config));
}
// What a thread leaves in its tiles makes it slow to interrupt.
MFK_INLINE void release() { asm volatile("tilerelease" : : : "memory"); }

template <int kTile>
MFK_INLINE void clear() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
MFK_INLINE void load_rows(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
MFK_INLINE void store_rows(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <class T, int kSum, int kLeft, int kRight>
MFK_INLINE void multiply() {
  if constexpr (kInteger<T>) {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
  } else {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
  }
}

// Two tiles of positions, if kTiles is 2, by two panels, if kPanels is 2. A load serves as many products.
template <int kTiles, int kPanels, class T, class Out, class Epilogue>
void tiles(int64_t size, int64_t steps, Rows<T> x, const float* w, int64_t panel, Out* out,
           int64_t out_stride, Epilogue epilogue, int64_t first, int64_t o) {
  const int64_t all = blocks_of(x.run, kStep<T>), stride = x.position * sizeof(T), next = size * x.position;
  clear<0>();
  clear<1>();
  clear<2>();
  clear<3>();
  for (int64_t r = 0; r < x.runs; ++r) {
    const T* left = x.data + r * x.skip;
    for (int64_t c = 0; c < all; c += steps, left += kStep<T> * steps, w += steps * kPanel) {
      load_rows<6>(w, kPanel * sizeof(float));
      load_rows<4>(left, stride);
      multiply<T, 0, 4, 6>();
      if (kPanels > 1) {
        load_rows<7>(w + panel, kPanel * sizeof(float));
        multiply<T, 1, 4, 7>();
      }
      if (kTiles > 1) {
        load_rows<5>(left + next, stride);
        multiply<T, 2, 5, 6>();
        if (kPanels > 1) multiply<T, 3, 5, 7>();
      }
    }
  }
  alignas(64) float sums[4][16 * kPanel];
  constexpr int64_t row = kPanel * sizeof(float);
  store_rows<0>(sums[0], row);
  if (kPanels > 1) store_rows<1>(sums[1], row);
  if (kTiles > 1) store_rows<2>(sums[2], row);
  if (kTiles > 1 && kPanels > 1) store_rows<3>(sums[3], row);
  for (int v = 0; v < kPanels; ++v) {
    const SumEnd<T> end(w + v * panel);
    with_finish(epilogue, o + v * kPanel, [&](auto finish) __attribute__((always_inline)) {
      for (int t = 0; t < kTiles; ++t) {
        for (int64_t p = 0; p < size; ++p) {
          const vec<float> sum = end(load(sums[2 * t + v] + p * kPanel));
          const int64_t position = t * size + p;
          store(out + position * out_stride + v * kPanel, finish(sum + finish.bias, first + position));
        }
      }
    });
  }
}

// So many steps a tile, equally many in each; 0: vectors do it, since tiles would be mostly empty.
template <class T>
MFK_INLINE int64_t steps_of_tile(int64_t positions, int64_t run) {
  if (positions < 2 || !amx_in_use()) return 0;
  const int64_t steps = blocks_of(run, kStep<T>);
  int64_t fit = 16;
  while (steps % fit != 0) --fit;
  return fit >= 4 ? fit : 0;
}

// As vector_panels of gemm.h.
template <class T, class Out, class Epilogue>
void panels(int64_t positions, int64_t steps, Rows<T> x, Weights w, int64_t rows, Out* out,
            int64_t out_stride, Epilogue epilogue, int64_t from, int64_t to) {
  const int64_t panel = (rows + kLastRows<T>)*kPanel;
  const Tiles all(positions, 16);
  auto some = [&](int64_t size, int64_t count, int64_t first) {
    if (count == 0) return;
    configure(size, steps);
    for (int64_t o = from; o < to; o += 2 * kPanel) {
      const float* weights = w.data + (o - from) / kPanel * panel;
      for (int64_t t = 0; t < count; t += 2) {
        const int64_t position = first + t * size;
        auto run = [&](auto of_positions, auto of_outputs) {
          const Rows<T> here{x.data + position * x.position, x.position, x.runs, x.run, x.skip};
          tiles<decltype(of_positions)::value, decltype(of_outputs)::value>(
              size, steps, here, weights, panel, out + position * out_stride + o, out_stride, epilogue,
              position, o);
        };
        const std::integral_constant<int, 1> one;
        const std::integral_constant<int, 2> two;
        if (count - t > 1) {
          to - o > kPanel ? run(two, two) : run(two, one);
        } else {
          to - o > kPanel ? run(one, two) : run(one, one);
        }
      }
    }
  };
  some(all.size + 1, all.longer, 0);
  some(all.size, all.count - all.longer, all.longer * (all.size + 1));
  release();
}

}  // namespace amx
}  // namespace MFK_ISA
}  // namespace mfk
