// A stand-in for CUDA's runtime, as far as our host code uses it: it notes launches, refuses what a device
// would refuse, and runs the rest on the emulator.
#pragma once

#include <stddef.h>

#include <functional>
#include <string>

#include "../emulator.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorMisalignedAddress = 716,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
};
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace stand_in {

// Notes a launch and says whether a device would make it; `run` is what it does for one thread.
cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& run);
cudaError_t allow_shared(const void* kernel, cudaFuncAttribute attribute, int bytes);

}  // namespace stand_in

cudaError_t cudaGetLastError();
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return stand_in::allow_shared(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return stand_in::launch(reinterpret_cast<const void*>(kernel), *config, [&] { kernel(arguments...); });
}
// What is not allowed while a stream is captured. No host code of ours calls it; a test does.
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
