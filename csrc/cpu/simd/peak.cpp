#include "peak.h"

#include "vec.h"

namespace mfk {
namespace MFK_ISA {

void multiply_add_peak(const PeakArgs& args, int64_t begin, int64_t end) {
  constexpr int kSums = MFK_VECTOR_REGISTERS == 32 ? 24 : 12, kSteps = 20000;  // as the registers allow
  vec<float> sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = splat(i + 1.0f);
  // Arm's instruction adds to what the result is written over: any other term would be copied there first.
  const vec<float> factor = splat(1e-7f);
  for (int64_t task = begin; task < end; ++task) {
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 24
      for (int i = 0; i < kSums; ++i) sums[i] += sums[i] * factor;
    }
  }
  vec<float> all{};
  for (int i = 0; i < kSums; ++i) all += sums[i];
  *args.result = max_lanes<float>(all);
  *args.operations = 2.0 * kSteps * kSums * kLanes<float>;
}

}  // namespace MFK_ISA
}  // namespace mfk
