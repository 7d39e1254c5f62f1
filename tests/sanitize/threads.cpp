// Deployed networks on plain threads, for the thread sanitizer: several calls at a time, each on several
// threads, must give the bits of one call on one thread.
//   threads FOLDER: of files of 64-bit integers and of floats, written by tests/sanitize/plan.py
#include <cstdio>
#include <fstream>
#include <string>
#include <thread>

#include "../../csrc/ops/network.h"

namespace {

template <class T>
std::vector<T> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  std::vector<T> values(file.tellg() / sizeof(T));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(values.data()), values.size() * sizeof(T));
  return values;
}

std::vector<float> call(const std::vector<int64_t>& plan, const std::vector<float>& weights, int64_t batch,
                        int64_t side, int64_t threads) {
  std::vector<float> x(batch * 3 * side * side), out(batch * 10);
  uint32_t state = 1;
  for (float& value : x) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(state >> 8) / (1 << 23) - 1;
  }
  const mfk::Images images{x.data(), batch, side, side, 3 * side * side, side * side, side, 1};
  auto parallel = [&](int64_t tasks, auto f) {
    std::vector<std::thread> workers;
    for (int64_t t = 0; t < threads; ++t) {
      const int64_t begin = tasks * t / threads, end = tasks * (t + 1) / threads;
      if (begin < end) workers.emplace_back([=] { f(begin, end); });
    }
    for (std::thread& worker : workers) worker.join();
  };
  const mfk::Network network(plan.data(), weights.data(), images);
  mfk::run_network(network, batch, 10, out.data(), threads, parallel, [] {});
  return out;
}

// How many results differ.
int compare(const std::string& name) {
  const auto plan = read<int64_t>(name + ".plan");
  const auto weights = read<float>(name + ".weights");
  mfk::PlanCheck::run(plan.data(), plan.size(), weights.size(), 10);
  int wrong = 0;
  for (const int64_t batch : {1, 5}) {
    const auto expected = call(plan, weights, batch, 96, 1);
    std::vector<std::vector<float>> results(4);
    std::vector<std::thread> callers;
    for (auto& result : results) {
      callers.emplace_back([&] {
        for (int i = 0; i < 3; ++i) result = call(plan, weights, batch, 96, 3);
      });
    }
    for (std::thread& caller : callers) caller.join();
    for (const auto& result : results) wrong += result != expected;
  }
  return wrong;
}

}  // namespace

int main(int, char** argv) {
  const std::string folder = argv[1];
  const int wrong = compare(folder + "/mobile_former_26m") + compare(folder + "/dmf_96");
  std::printf(wrong == 0 ? "the same bits on all threads\n" : "%d results differ\n", wrong);
  return wrong != 0;
}
