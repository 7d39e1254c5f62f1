// former_block's kernel on the emulator, for tests/test_cuda.py.
#include "../../csrc/cuda/former_block.cuh"

using namespace mfk::cuda;

// The weights in the operator's order; null where left out. 0: all went well.
template <class T>
int run(const void* x, void* y, const void* const* weights, int batch, int tokens, int width, int heads,
        int hidden, int standard, float eps, int seed) {
  FormerWeights<T> w;
  memcpy(&w, weights, sizeof w);
  const FormerSizes s{tokens, width, heads, hidden, standard != 0, w.fc1_weight != nullptr, eps};
  const int bytes = static_cast<int>(FormerRooms(s).total * sizeof(float));
  const auto kernel = [&] { former_block_kernel(static_cast<const T*>(x), static_cast<T*>(y), w, s); };
  return !emulator::launch(batch, kThreads, bytes, seed, kernel).empty();
}

#define MFK_FORMER(name, T)                                                                                 \
  extern "C" int former_block_##name(const void* x, void* y, const void* const* weights, int batch,         \
                                     int tokens, int width, int heads, int hidden, int standard, float eps, \
                                     int seed) {                                                            \
    return run<T>(x, y, weights, batch, tokens, width, heads, hidden, standard, eps, seed);                 \
  }
MFK_FORMER(float32, float)
#ifndef MFK_ONE_TYPE
MFK_FORMER(bfloat16, __nv_bfloat16)
MFK_FORMER(float16, __half)
#endif
