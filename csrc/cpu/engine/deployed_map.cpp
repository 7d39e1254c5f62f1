#include "../simd/gemm.h"
#include "../simd/tile.h"
#include "deployed.h"

namespace mfk {
namespace MFK_ISA {

void deployed_map(const DeployedMapArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t n = kLanes<float>;
  const int64_t width = padded(args.channels);
  const FeatureMap<const Stored> in{static_cast<const Stored*>(args.in), 0, 1, width};
  const int64_t until = end * kMapTask < args.pixels ? end * kMapTask : args.pixels;
  if (args.out.stride_c == 1) {
    for (int64_t p = begin * kMapTask; p < until; ++p) {
      const Stored* from = in.at(0, 0, p);
      float* to = args.out.at(args.sample, 0, p);
      for (int64_t c = 0; c < args.channels; c += n) store_upto(to + c, load(from + c), args.channels - c);
    }
    return;
  }
  Buffer<float> tile(width * kMapTask);
  for (int64_t p = begin * kMapTask; p < until; p += kMapTask) {
    const int64_t count = until - p < kMapTask ? until - p : kMapTask;
    copy_tile<Stored>(in, 0, 0, args.channels, p, count, tile, kMapTask);
    store_tile<float>(args.out, args.sample, 0, args.channels, p, count, tile, kMapTask);
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
