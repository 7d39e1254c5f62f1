// former_block's kernel on the emulator, for tests/test_cuda.py.
#include "../../csrc/cuda/former_block.cuh"

using namespace mfk::cuda;

// The weights in the operator's order; null where left out. 0: all went well.
extern "C" int former_block(const float* x, float* y, const float* const* weights, int batch, int tokens,
                            int width, int heads, int hidden, int standard, float eps, int backwards) {
  FormerWeights<float> w;
  memcpy(&w, weights, sizeof w);
  const FormerSizes s{tokens, width, heads, hidden, standard != 0, w.fc1_weight != nullptr, eps};
  return !emulator::launch(batch, kThreads, FormerRooms(s).total, backwards != 0,
                           [&] { former_block_kernel(x, y, w, s); });
}
