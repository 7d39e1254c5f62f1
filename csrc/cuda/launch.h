// What the operators on CUDA devices do before a launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <mutex>
#include <set>
#include <utility>

#include "../ops/common.h"

namespace mfk {
namespace cuda {

inline cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// kernel(arguments...) by so many blocks and threads, on x's current stream.
template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t bytes, const Tensor& x,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream_of(x);
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

// Lets the kernel have as much shared memory as the device has, once; `what` needs so many bytes of it. Were
// it each launch's own number, another thread could lower it between this call and the launch.
template <class Kernel>
void allow_shared(const char* op, const std::string& what, Kernel kernel, int64_t bytes, int device) {
  int most = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  STD_TORCH_CHECK(bytes <= most, op, ": ", what, " need ", bytes,
                  " bytes of shared memory, and this device has ", most, "; use the backend \"triton\"");
  static std::mutex mutex;
  static std::set<std::pair<Kernel, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!allowed.emplace(kernel, device).second) return;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
}

// The tensor, or a copy of it where it does not begin as vectors of 16 bytes do.
inline Tensor aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 ? t : torch::stable::clone(t);
}

// run(number) with a number of x's type.
template <class Run>
void with_type(const char* op, const char* name, const Tensor& x, Run run) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return run(float());
    case ScalarType::BFloat16:
      return run(__nv_bfloat16());
    case ScalarType::Half:
      return run(__half());
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16 or float16");
  }
}

}  // namespace cuda
}  // namespace mfk
