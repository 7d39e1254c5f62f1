// dynamic_bottleneck's kernel on the emulator, for tests/test_cuda.py.
#include "../../csrc/cuda/dynamic_bottleneck.cuh"

using namespace mfk::cuda;

// The weights in the operator's order, then keys and values; strides of sample, channel, row and column. 0:
// all went well.
template <class T>
int run(const void* x, const int64_t* x_at, void* y, const int64_t* y_at, const void* const* weights,
        int batch, const int* sizes, int tokens, int heads, int skip, int seed) {
  BottleneckWeights<T> w;
  memcpy(&w, weights, sizeof w);
  const auto given = [&](int i) { return static_cast<const T*>(weights[i]); };
  const BridgeBack<T> bridge{given(8), given(9), tokens, heads};
  MapStrides from, to;
  memcpy(&from, x_at, sizeof from);
  memcpy(&to, y_at, sizeof to);
  const BottleneckSizes s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], skip != 0};
  const int tiles = ((s.height + kTile - 1) / kTile) * ((s.width + kTile - 1) / kTile);
  const auto launch = [&](auto columns) {
    constexpr int kColumns = decltype(columns)::value;
    const int bytes = BottleneckRooms<T>(s, 16 * kColumns).total;
    const auto kernel = [&] {
      dynamic_bottleneck_kernel<T, kColumns>(static_cast<const T*>(x), from, static_cast<T*>(y), to, w,
                                             bridge, s);
    };
    return !emulator::launch(batch * tiles, kBottleneckThreads, bytes, seed, kernel).empty();
  };
  if (s.outputs <= 64) return launch(std::integral_constant<int, 4>());
  return s.outputs <= 128 ? launch(std::integral_constant<int, 8>())
                          : launch(std::integral_constant<int, 16>());
}

#define MFK_BOTTLENECK(name, T)                                                                              \
  extern "C" int dynamic_bottleneck_##name(const void* x, const int64_t* x_at, void* y, const int64_t* y_at, \
                                           const void* const* weights, int batch, const int* sizes,          \
                                           int tokens, int heads, int skip, int seed) {                      \
    return run<T>(x, x_at, y, y_at, weights, batch, sizes, tokens, heads, skip, seed);                       \
  }
MFK_BOTTLENECK(float32, float)
#ifndef MFK_ONE_TYPE
MFK_BOTTLENECK(bfloat16, __nv_bfloat16)
MFK_BOTTLENECK(float16, __half)
#endif
