// dynamic_bottleneck's kernel on the emulator, for tests/test_cuda.py.
#include "../../csrc/cuda/dynamic_bottleneck.cuh"

using namespace mfk::cuda;

// The weights in the operator's order, then keys and values; strides of sample, channel, row and column. 0:
// all went well.
extern "C" int dynamic_bottleneck(const float* x, const int64_t* x_at, float* y, const int64_t* y_at,
                                  const float* const* weights, int batch, int inputs, int hidden, int outputs,
                                  int height, int width, int tokens, int heads, int skip, int backwards) {
  BottleneckWeights<float> w;
  memcpy(&w, weights, sizeof w);
  const BridgeBack<float> bridge{weights[8], weights[9], tokens, heads};
  MapStrides from, to;
  memcpy(&from, x_at, sizeof from);
  memcpy(&to, y_at, sizeof to);
  const BottleneckSizes s{inputs, hidden, outputs, height, width, skip != 0};
  const int tiles = ((height + kTile - 1) / kTile) * ((width + kTile - 1) / kTile);
  const auto run = [&](auto columns) {
    constexpr int kColumns = decltype(columns)::value;
    const int floats = BottleneckRooms<float>(s, 16 * kColumns).total / static_cast<int>(sizeof(float));
    return !emulator::launch(batch * tiles, kBottleneckThreads, floats, backwards != 0, [&] {
      dynamic_bottleneck_kernel<float, kColumns>(x, from, y, to, w, bridge, s);
    });
  };
  if (outputs <= 64) return run(std::integral_constant<int, 4>());
  return outputs <= 128 ? run(std::integral_constant<int, 8>()) : run(std::integral_constant<int, 16>());
}
