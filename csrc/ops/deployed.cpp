// The operators of deployed networks: their output, the maps of their pyramid, and the seconds that each step
// takes.
#include <chrono>

#include "common.h"
#include "network.h"
#include "plan_seal.h"

namespace mfk {
namespace {

constexpr const char* kOp = "deploy";
constexpr int64_t kMostRows = 1 << 16, kMostBins = 1 << 16;

// (B, classes), or where `classes` is 0 the maps that are results.
template <class Done>
std::vector<Tensor> run(const Tensor& x, const Tensor& weights, const Tensor& plan, int64_t classes,
                        Done done, const Calibration* calibration = nullptr) {
  check_axes(kOp, "x", x, 4, "(B, C, H, W)");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, kOp, ": x must be float32");
  STD_TORCH_CHECK(x.is_cpu() && weights.is_cpu() && plan.is_cpu(), kOp,
                  ": x, weights and plan must be on the CPU");
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float && weights.is_contiguous(), kOp,
                  ": weights must be float32 and contiguous, as deploy made them");
  STD_TORCH_CHECK(plan.scalar_type() == ScalarType::Long && plan.is_contiguous() && plan.dim() == 1, kOp,
                  ": plan must be a vector of int64, as deploy made it");
  const auto* sealed = plan.const_data_ptr<int64_t>();
  check_plan(sealed, plan.numel());
  STD_TORCH_CHECK(classes == sealed[2], kOp, ": classes must be ", sealed[2], ", as of the plan, got ",
                  classes);
  const int64_t* words = sealed + kSealWords;
  PlanCheck::run(words, plan.numel() - kSealWords, weights.numel(), classes);
  const int64_t channels = reinterpret_cast<const Plan*>(words)->in_channels;
  STD_TORCH_CHECK(x.size(1) == channels, kOp, ": x must have ", channels, " channels, got ", x.size(1));
  STD_TORCH_CHECK(x.size(2) >= 1 && x.size(3) >= 1, kOp, ": x must have at least one pixel");
  STD_TORCH_CHECK(x.size(2) <= kMostRows && x.size(3) <= kMostRows, kOp, ": x must have at most ", kMostRows,
                  " rows and columns, got ", x.size(2), "x", x.size(3));
  const Images images{x.const_data_ptr<float>(),
                      x.size(0),
                      x.size(2),
                      x.size(3),
                      x.stride(0),
                      x.stride(1),
                      x.stride(2),
                      x.stride(3)};
  Network network(words, weights.const_data_ptr<float>(), images);
  STD_TORCH_CHECK(
      !network.bf16() || bf16_supported(), kOp,
      ": a network in bfloat16 needs a processor with AVX512-BF16 and the instruction set avx512, or on Arm "
      "BF16 and i8mm");
  std::vector<Tensor> out;
  if (classes > 0) out.push_back(empty({images.batch, classes}, ScalarType::Float, x));
  for (HandedOut& map : network.handed_out()) {
    const int64_t pixels = map.height * map.width;
    out.push_back(empty_map(x, {images.batch, map.channels, map.height, map.width}));
    float* data = out.back().mutable_data_ptr<float>();
    // New memory, of many megabytes for a detector: its pages would cost as much time as what is written
    // there.
    advise_huge_pages(reinterpret_cast<uintptr_t>(data), out.back().numel() * sizeof(float));
    map.to = is_channels_last(x) ? FeatureMap<float>{data, map.channels * pixels, 1, map.channels}
                                 : FeatureMap<float>{data, map.channels * pixels, pixels, 1};
  }
  if (images.batch == 0) return out;
  network.calibrate(calibration);
  const int64_t threads = calibration != nullptr ? 1 : torch::stable::get_num_threads();
  run_network(
      network, images.batch, classes, classes > 0 ? out[0].mutable_data_ptr<float>() : nullptr, threads,
      [](int64_t tasks, auto f) { parallel_for(tasks, 1, f); }, done);
  return out;
}

Tensor forward(const Tensor& image, const Tensor& weights, const Tensor& plan, int64_t classes) {
  STD_TORCH_CHECK(classes > 0, kOp, ": classes must be at least 1, got ", classes);
  return run(image, weights, plan, classes, [] {})[0];
}

// The maps that are results: each with its channels and its size, (side + margin) / reduction of an image's
// side, or where the reduction is negative with so many rows and one column; these are there for those that
// trace the operator without running it.
std::vector<Tensor> maps(const Tensor& image, const Tensor& weights, const Tensor& plan,
                         const std::vector<int64_t>& channels, const std::vector<int64_t>& reductions,
                         const std::vector<int64_t>& margins) {
  auto found = run(image, weights, plan, 0, [] {});
  const size_t count = found.size();
  bool fits = channels.size() == count && reductions.size() == count && margins.size() == count;
  for (size_t i = 0; fits && i < count; ++i) {
    const int64_t by = reductions[i], margin = margins[i];
    const int64_t height = found[i].size(2), width = found[i].size(3);
    fits = margin > -kMostRows && margin < kMostOf && by > -kMostOf && found[i].size(1) == channels[i] &&
           (by >= 1 ? height == (image.size(2) + margin) / by && width == (image.size(3) + margin) / by
                    : height + by == 0 && width == 1);
  }
  STD_TORCH_CHECK(fits, kOp, ": channels, reductions and margins must be those of the plan's maps");
  return found;
}

// Seconds, float64, that each step takes for a batch of one.
Tensor times(const Tensor& image, const Tensor& weights, const Tensor& plan, int64_t classes) {
  STD_TORCH_CHECK(image.dim() == 4 && image.size(0) == 1, kOp, ": x must be one image");
  using Clock = std::chrono::steady_clock;
  std::vector<double> seconds;
  auto before = Clock::now();
  run(image, weights, plan, classes, [&] {
    const auto now = Clock::now();
    seconds.push_back(std::chrono::duration<double>(now - before).count());
    before = now;
  });
  Tensor out = empty({static_cast<int64_t>(seconds.size())}, ScalarType::Double, image);
  std::copy(seconds.begin(), seconds.end(), out.mutable_data_ptr<double>());
  return out;
}

// What the products of a plan that is calibrated find in their inputs, float64: where `bins` is 0 the
// smallest and the largest, (products, 2); else (products, bins), how many are in each bin between `ranges`
// (products, 2), with those beyond in the first and the last one.
Tensor calibrated(const Tensor& image, const Tensor& weights, const Tensor& plan, int64_t classes,
                  const Tensor& ranges, int64_t bins) {
  STD_TORCH_CHECK(ranges.scalar_type() == ScalarType::Double && ranges.is_contiguous() && ranges.dim() == 2 &&
                      ranges.size(1) == 2 && ranges.size(0) <= kMostProducts && ranges.is_cpu(),
                  kOp, ": ranges must be contiguous float64 (products, 2) on the CPU");
  STD_TORCH_CHECK(bins >= 0 && bins <= kMostBins, kOp, ": bins must be from 0 to ", kMostBins, ", got ",
                  bins);
  const int64_t products = ranges.size(0), columns = bins > 0 ? bins : 2;
  Tensor out = empty({products, columns}, ScalarType::Double, image);
  double* found = out.mutable_data_ptr<double>();
  for (int64_t i = 0; i < products * columns; ++i) {
    found[i] = bins > 0 ? 0 : (i % 2 == 0 ? __builtin_inf() : -__builtin_inf());
  }
  const Calibration calibration{ranges.const_data_ptr<double>(), found, products, bins};
  run(image, weights, plan, classes, [] {}, &calibration);
  return out;
}

}  // namespace
}  // namespace mfk

STABLE_TORCH_LIBRARY_FRAGMENT(mfkernels, m) {
  m.def("deployed(Tensor x, Tensor weights, Tensor plan, int classes) -> Tensor");
  m.def("deployed_times(Tensor x, Tensor weights, Tensor plan, int classes) -> Tensor");
  m.def(
      "deployed_calibrated(Tensor x, Tensor weights, Tensor plan, int classes, Tensor ranges, int bins) -> "
      "Tensor");
  m.def(
      "deployed_maps(Tensor x, Tensor weights, Tensor plan, int[] channels, int[] reductions, int[] margins) "
      "-> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(mfkernels, CPU, m) {
  m.impl("deployed", TORCH_BOX(&mfk::forward));
  m.impl("deployed_times", TORCH_BOX(&mfk::times));
  m.impl("deployed_calibrated", TORCH_BOX(&mfk::calibrated));
  m.impl("deployed_maps", TORCH_BOX(&mfk::maps));
}
