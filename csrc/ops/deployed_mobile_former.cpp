#include <chrono>

#include "common.h"
#include "deployed_network.h"

namespace mfk {
namespace {

constexpr const char* kOp = "deployed_mobile_former";

template <class Done>
Tensor run(const Tensor& x, const Tensor& weights, const Tensor& plan_tensor, int64_t classes, Done done) {
  STD_TORCH_CHECK(x.dim() == 4, kOp, ": x must have 4 dimensions (B, C, H, W), got ", x.dim());
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, kOp, ": x must be float32");
  STD_TORCH_CHECK(x.is_cpu() && weights.is_cpu() && plan_tensor.is_cpu(), kOp, ": x must be on the CPU");
  const int64_t words = plan_tensor.numel(), header = sizeof(MobileFormerPlan) / 8,
                pass = sizeof(PlanPass) / 8;
  bool ours = weights.scalar_type() == ScalarType::Float && weights.is_contiguous() &&
              plan_tensor.scalar_type() == ScalarType::Long && plan_tensor.is_contiguous() &&
              words >= header + pass;
  const auto* plan = static_cast<const MobileFormerPlan*>(plan_tensor.data_ptr());
  ours = ours && plan->passes <= kMostPasses && words == header + plan->passes * pass &&
         weights.numel() == plan->weights && plan->classifier.outputs >= classes;
  STD_TORCH_CHECK(ours, kOp, ": weights and plan must be those that deploy made");
  STD_TORCH_CHECK(
      !plan->bf16 || bf16_supported(), kOp,
      ": a network in bfloat16 needs a processor with AVX512-BF16, and the instruction set avx512");
  STD_TORCH_CHECK(x.size(1) == passes_of(*plan)->in_channels, kOp, ": x must have ",
                  passes_of(*plan)->in_channels, " channels, got ", x.size(1));
  STD_TORCH_CHECK(x.size(2) >= 1 && x.size(3) >= 1, kOp, ": x must have at least one pixel");
  Tensor out = empty({x.size(0), classes}, ScalarType::Float, x);
  if (x.size(0) == 0) return out;
  const Images images{x.const_data_ptr<float>(),
                      x.size(0),
                      x.size(2),
                      x.size(3),
                      x.stride(0),
                      x.stride(1),
                      x.stride(2),
                      x.stride(3)};
  run_network(
      *plan, weights.const_data_ptr<float>(), images, classes, out.mutable_data_ptr<float>(),
      torch::stable::get_num_threads(),
      [](int64_t tasks, auto f) { torch::stable::parallel_for(0, tasks, 1, f); }, done);
  return out;
}

Tensor forward(const Tensor& image, const Tensor& weights, const Tensor& plan, int64_t classes) {
  return run(image, weights, plan, classes, [] {});
}

// Seconds, float64, that each step takes for a batch of one: for each pass its tokens and
// itself, then the last tokens, the head, and the two linear layers.
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

}  // namespace
}  // namespace mfk

STABLE_TORCH_LIBRARY_FRAGMENT(mfkernels, m) {
  m.def("deployed_mobile_former(Tensor x, Tensor weights, Tensor plan, int classes) -> Tensor");
  m.def("deployed_mobile_former_times(Tensor x, Tensor weights, Tensor plan, int classes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mfkernels, CPU, m) {
  m.impl("deployed_mobile_former", TORCH_BOX(&mfk::forward));
  m.impl("deployed_mobile_former_times", TORCH_BOX(&mfk::times));
}
