// former_block on CUDA devices, as mfkernels_cuda::former_block.
#include "../ops/former_call.h"
#include "former_block.cuh"
#include "launch.h"

namespace mfk {
namespace {

using Given = std::optional<Tensor>;

template <class T>
void launch(const FormerCall& call, Tensor& y) {
  const FormerArgs& a = call.args;
  const cuda::FormerSizes sizes{static_cast<int>(a.tokens),
                                static_cast<int>(a.width),
                                static_cast<int>(a.heads),
                                static_cast<int>(a.hidden),
                                a.standard,
                                a.ffn,
                                static_cast<float>(a.eps)};
  cuda::FormerWeights<T> weights;
  const T** pointers[] = {&weights.qkv_weight, &weights.qkv_bias,     &weights.proj_weight,
                          &weights.proj_bias,  &weights.norm1_weight, &weights.norm1_bias,
                          &weights.fc1_weight, &weights.fc1_bias,     &weights.fc2_weight,
                          &weights.fc2_bias,   &weights.norm2_weight, &weights.norm2_bias};
  Tensor aligned[12];
  for (int i = 0; i < 12; ++i) {
    const Tensor& t = call.parameters[i];
    *pointers[i] = nullptr;
    if (!t.defined()) continue;
    aligned[i] = cuda::aligned(t);
    *pointers[i] = static_cast<const T*>(aligned[i].data_ptr());
  }
  const int64_t bytes = cuda::FormerRooms(sizes).total * sizeof(float);
  const auto kernel = cuda::former_block_kernel<T>;
  const std::string what = std::to_string(a.tokens) + " tokens of width " + std::to_string(a.width);
  cuda::allow_shared("former_block", what, kernel, bytes, y.get_device_index());
  cuda::launch_kernel(kernel, a.batch, cuda::kThreads, bytes, y, static_cast<const T*>(a.x),
                      static_cast<T*>(y.data_ptr()), weights, sizes);
}

Tensor forward(const Tensor& tokens, const Tensor& qkv_weight, Given qkv_bias, const Tensor& proj_weight,
               Given proj_bias, const Tensor& norm1_weight, const Tensor& norm1_bias, Given fc1_weight,
               Given fc1_bias, Given fc2_weight, Given fc2_bias, Given norm2_weight, Given norm2_bias,
               int64_t num_heads, std::string form, double eps) {
  const Given given[] = {qkv_weight, qkv_bias, proj_weight, proj_bias, norm1_weight, norm1_bias,
                         fc1_weight, fc1_bias, fc2_weight,  fc2_bias,  norm2_weight, norm2_bias};
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  const FormerCall call(tokens, given, num_heads, form, eps);
  Tensor y = torch::stable::empty(shape_of(tokens), tokens.scalar_type(), std::nullopt, tokens.device());
  // So few that products of them fit an int; the shared memory holds less still.
  STD_TORCH_CHECK(call.args.tokens < 4096 && call.args.width < 16384 && call.args.hidden < 65536 &&
                      call.args.batch < 2147483648,
                  "former_block: tokens are too many or too wide, use the backend \"triton\"");
  if (y.numel() == 0) return y;
  cuda::with_type("former_block", "tokens", tokens, [&](auto number) { launch<decltype(number)>(call, y); });
  return y;
}

}  // namespace
}  // namespace mfk

STABLE_TORCH_LIBRARY_FRAGMENT(mfkernels_cuda, m) {
  m.def(
      "former_block(Tensor tokens, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, Tensor? "
      "proj_bias, Tensor norm1_weight, Tensor norm1_bias, Tensor? fc1_weight, Tensor? fc1_bias, Tensor? "
      "fc2_weight, Tensor? fc2_bias, Tensor? norm2_weight, Tensor? norm2_bias, int num_heads, str form, "
      "float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mfkernels_cuda, CUDA, m) { m.impl("former_block", TORCH_BOX(&mfk::forward)); }
