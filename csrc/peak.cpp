#include "cpu/simd/peak.h"

#include <chrono>

namespace mfk {

double peak_flops() {
  double operations = 0, best = 0;
  float result = 0;
  const PeakArgs args{&operations, &result};
  for (int run = 0; run < 20; ++run) {
    const auto start = std::chrono::steady_clock::now();
    multiply_add_peak(args, 0, 10);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    const double rate = 10 * operations / seconds.count();
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace mfk
