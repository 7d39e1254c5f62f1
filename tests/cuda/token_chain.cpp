// token_chain's kernel on the emulator, for tests/test_cuda.py.
#include "../../csrc/cuda/token_chain.cuh"

using namespace mfk::cuda;

// 0: all went well.
template <class T>
int run(const void* tokens, const void* gathered, const void* packed, const int64_t* offsets,
        const int64_t* sizes, float eps, void* const* results, int seed) {
  const ChainSizes s = chain_sizes(sizes, eps);
  const auto w = chain_weights(static_cast<const T*>(packed), offsets);
  const auto to = [&](int i) { return static_cast<T*>(results[i]); };
  const int bytes = static_cast<int>(chain_rooms(s).total * sizeof(float));
  const auto kernel = [&] {
    token_chain_kernel(static_cast<const T*>(tokens), static_cast<const T*>(gathered), to(0), to(1), to(2),
                       to(3), w, s);
  };
  return !emulator::launch(s.samples, kThreads, bytes, seed, kernel).empty();
}

#define MFK_CHAIN(name, T)                                                                        \
  extern "C" int token_chain_##name(const void* tokens, const void* gathered, const void* packed, \
                                    const int64_t* offsets, const int64_t* sizes, float eps,      \
                                    void* const* results, int seed) {                             \
    return run<T>(tokens, gathered, packed, offsets, sizes, eps, results, seed);                  \
  }
MFK_CHAIN(float32, float)
#ifndef MFK_ONE_TYPE
MFK_CHAIN(bfloat16, __nv_bfloat16)
MFK_CHAIN(float16, __half)
#endif
