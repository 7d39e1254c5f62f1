// How deployed networks run: memory and threads. No PyTorch in here, so that a sanitizer can run it on plain
// threads (tests/sanitize).
#pragma once

#include <algorithm>

#include "../cpu/engine/deployed_plan.h"
#include "working_memory.h"

namespace mfk {
namespace {

// Rows of a task, of a map of so many rows and columns: enough positions to use weights well while they are
// in the first cache, few enough that what lies between two products, so many floats a position, stays in the
// second, `most` in all; at least four tasks for the threads, where the map is large enough.
inline int64_t task_rows(int64_t rows, int64_t width, int64_t floats, int64_t most) {
  const int64_t positions = std::min<int64_t>(std::max<int64_t>(rows * width / 4, 224), 896);
  const int64_t fitting = std::min(blocks_of(positions, width), most / (width * floats));
  return std::min(std::max<int64_t>(fitting, 1), rows);
}
constexpr int64_t kSecondCache = 122880;  // floats

// A map that is a result, and where it is written to.
struct HandedOut {
  int64_t channels, height, width;
  FeatureMap<float> to;

  template <class Run>
  void write(bool bf16, const void* from, int64_t sample, Run run) const {
    const int64_t pixels = height * width;
    const DeployedMapArgs args{bf16, from, pixels, channels, to, sample};
    run(blocks_of(pixels, kMapTask), [&](int64_t begin, int64_t end) { deployed_map(args, begin, end); });
  }
};

// The whole network: `out` (batch, classes). `network.features` makes of a sample the inputs of the first of
// the linear layers, which take the batch at once; where there are none, it writes the maps that are results.
// `parallel(tasks, f)` calls f(begin, end) over the tasks on at most `threads` threads; `done()` is called
// after each step on one thread.
template <class Network, class Parallel, class Done>
void run_network(const Network& network, int64_t batch, int64_t classes, float* out, int64_t threads,
                 Parallel parallel, Done done) {
  const int64_t share = padded(network.memory());
  const int64_t width = network.linears() > 0 ? padded(network.linear(0).linear.inputs) : 0;
  int64_t widest = width;
  for (int64_t i = 0; i < network.linears(); ++i) {
    widest = std::max(widest, network.linear(i).linear.outputs);
  }
  const bool by_sample = threads > 1 && batch >= threads;
  const Memory memory((by_sample ? threads : 1) * share + 2 * batch * widest);
  float* from = memory.get() + (by_sample ? threads : 1) * share;
  float* to = from + batch * widest;
  if (by_sample) {
    parallel(threads, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t b = batch * t / threads; b < batch * (t + 1) / threads; ++b) {
          network.features(
              b, memory.get() + t * share, from + b * width, [](int64_t tasks, auto f) { f(0, tasks); },
              [] {});
        }
      }
    });
  } else {
    for (int64_t b = 0; b < batch; ++b) {
      auto run = [&](int64_t tasks, auto f) {
        if (threads > 1 && tasks > 1) {
          parallel(tasks, f);
        } else {
          f(0, tasks);
        }
      };
      network.features(b, memory.get(), from + b * width, run, done);
    }
  }
  int64_t stride = width;
  for (int64_t i = 0; i < network.linears(); ++i) {
    const PlanLayer& layer = network.linear(i);
    const int64_t outputs = layer.linear.outputs;
    const DeployedLinearArgs args{network.bf16(),
                                  network.narrow(),
                                  layer.linear,
                                  static_cast<PlanActivation>(layer.activation),
                                  network.weights(),
                                  from,
                                  stride,
                                  batch,
                                  to,
                                  outputs};
    parallel(blocks_of(outputs, kOutputsTask),
             [&](int64_t begin, int64_t end) { deployed_linear(args, begin, end); });
    done();
    std::swap(from, to);
    stride = outputs;
  }
  for (int64_t b = 0; b < batch; ++b) std::copy_n(from + b * stride, classes, out + b * classes);
}

}  // namespace
}  // namespace mfk
