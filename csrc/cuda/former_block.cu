// former_block on CUDA devices, as mfkernels_cuda::former_block.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../ops/former_call.h"
#include "former_block.cuh"

namespace mfk {
namespace {

using Given = std::optional<Tensor>;

template <class T>
void launch(const FormerCall& call, Tensor& y, int device, cudaStream_t stream) {
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
    aligned[i] = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 ? t : torch::stable::clone(t);
    *pointers[i] = static_cast<const T*>(aligned[i].data_ptr());
  }
  const int bytes = cuda::FormerRooms(sizes).total * static_cast<int>(sizeof(float));
  int most = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  STD_TORCH_CHECK(bytes <= most, "former_block: ", a.tokens, " tokens of width ", a.width, " need ", bytes,
                  " bytes of shared memory, and this device has ", most, "; use the backend \"triton\"");
  const auto kernel = cuda::former_block_kernel<T>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<static_cast<unsigned>(a.batch), cuda::kThreads, bytes, stream>>>(
      static_cast<const T*>(a.x), static_cast<T*>(y.data_ptr()), weights, sizes);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
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
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tokens.get_device_index(), &stream));
  const auto run = [&](auto element) {
    launch<decltype(element)>(call, y, tokens.get_device_index(), static_cast<cudaStream_t>(stream));
  };
  switch (tokens.scalar_type()) {
    case ScalarType::Float:
      run(float());
      break;
    case ScalarType::BFloat16:
      run(__nv_bfloat16());
      break;
    case ScalarType::Half:
      run(__half());
      break;
    default:
      STD_TORCH_CHECK(false, "former_block: tokens must be float32, bfloat16 or float16");
  }
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
