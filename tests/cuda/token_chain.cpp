// token_chain's kernel on the emulator, for tests/test_cuda.py.
#include "../../csrc/cuda/token_chain.cuh"

using namespace mfk::cuda;

// 0: all went well.
extern "C" int token_chain(const float* tokens, const float* gathered, const float* packed,
                           const int64_t* offsets, const int64_t* sizes, float eps, float* result,
                           float* slopes1, float* slopes2, float* back, int backwards) {
  const ChainSizes s = chain_sizes(sizes, eps);
  const auto w = chain_weights(packed, offsets);
  return !emulator::launch(s.samples, kThreads, chain_rooms(s).total, backwards != 0, [&] {
    token_chain_kernel(tokens, gathered, result, slopes1, slopes2, back, w, s);
  });
}
