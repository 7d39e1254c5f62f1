// The stand-in's state, and the functions of PyTorch's CUDA library that our host code calls.
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "cuda_runtime.h"

namespace {

constexpr unsigned kMostBlocks[] = {2147483647, 65535, 65535};
constexpr int kOptedOut = 48 * 1024;  // bytes of shared memory that kernels have without asking
constexpr int kMostRun = 4096;        // blocks; of larger grids only the launch is noted

std::recursive_mutex mutex;
std::string noted;
int most_shared = 227 * 1024;
std::map<std::pair<const void*, int>, int> opted;  // of a kernel on a device
std::map<cudaStream_t, bool> captured;             // and whether the capture is still good
cudaError_t last = cudaSuccess;
std::string reason;
// Of a host thread.
thread_local int device = 0;
thread_local cudaStream_t current = nullptr;

cudaError_t refuse(cudaError_t error, const std::string& why) {
  last = error;
  reason = why;
  noted += "refused: " + why + "\n";
  return error;
}
std::string text(cudaStream_t stream) { return std::to_string(reinterpret_cast<size_t>(stream)); }

}  // namespace

cudaError_t stand_in::launch(const void* kernel, const cudaLaunchConfig_t& c,
                             const std::function<void()>& run) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  const unsigned grid[] = {c.gridDim.x, c.gridDim.y, c.gridDim.z};
  const unsigned threads = c.blockDim.x * c.blockDim.y * c.blockDim.z;
  for (int i = 0; i < 3; ++i) {
    if (grid[i] < 1 || grid[i] > kMostBlocks[i]) {
      return refuse(cudaErrorInvalidConfiguration, "a grid of " + std::to_string(grid[i]) + " blocks");
    }
  }
  if (threads < 1 || threads > 1024) {
    return refuse(cudaErrorInvalidConfiguration, "blocks of " + std::to_string(threads) + " threads");
  }
  const auto found = opted.find({kernel, device});
  const size_t allowed = found == opted.end() ? kOptedOut : found->second;
  if (c.dynamicSmemBytes > allowed) {
    return refuse(cudaErrorInvalidValue, std::to_string(c.dynamicSmemBytes) +
                                             " bytes of shared memory, where " + std::to_string(allowed) +
                                             " are allowed");
  }
  if (c.stream != current) {
    return refuse(cudaErrorInvalidValue,
                  "a launch on stream " + text(c.stream) + ", the current one is " + text(current));
  }
  const auto capture = captured.find(c.stream);
  if (capture != captured.end() && !capture->second) {
    return refuse(cudaErrorStreamCaptureInvalidated, "a launch in a capture that failed before");
  }
  noted += "launch on stream " + text(c.stream) + (capture == captured.end() ? "" : " captured") + ": " +
           std::to_string(grid[0]) + " blocks of " + std::to_string(threads) + " threads, " +
           std::to_string(c.dynamicSmemBytes) + " bytes\n";
  if (grid[0] > kMostRun) return cudaSuccess;
  constexpr int kAnyOrder = 2;
  const std::string& failed = emulator::launch(grid[0], threads, c.dynamicSmemBytes, kAnyOrder, run);
  return failed.empty() ? cudaSuccess : refuse(cudaErrorMisalignedAddress, failed);
}

cudaError_t stand_in::allow_shared(const void* kernel, cudaFuncAttribute attribute, int bytes) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || bytes < 0 || bytes > most_shared) {
    return refuse(cudaErrorInvalidValue, std::to_string(bytes) + " bytes of shared memory for a kernel");
  }
  opted[{kernel, device}] = bytes;
  noted += "allowed " + std::to_string(bytes) + " bytes on device " + std::to_string(device) + "\n";
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = most_shared;
  return attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  const auto capture = captured.find(stream);
  if (capture == captured.end()) return cudaSuccess;
  capture->second = false;
  return refuse(cudaErrorStreamCaptureUnsupported,
                "a wait for stream " + text(stream) + " while it is captured");
}

// PyTorch's. A tensor of a CPU has device -1, which the tests take for one of CUDA.
struct DeviceGuardOpaque {
  int before;
};
extern "C" int32_t aoti_torch_create_device_guard(int32_t index, DeviceGuardOpaque** guard) {
  *guard = new DeviceGuardOpaque{std::exchange(device, index)};
  return 0;
}
extern "C" int32_t aoti_torch_delete_device_guard(DeviceGuardOpaque* guard) {
  device = guard->before;
  delete guard;
  return 0;
}
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = current;
  return 0;
}
extern "C" int32_t torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool,
                                            char** message) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  if (error != 0) *message = strdup(("CUDA error " + std::to_string(error) + ": " + reason).c_str());
  return 0;
}
extern "C" void torch_c10_cuda_free_error_msg(char* message) { free(message); }

// For the tests.
extern "C" void stand_in_reset(int shared) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  most_shared = shared;
  noted.clear();
  captured.clear();
  last = cudaSuccess;
}
// For the calling thread.
extern "C" void stand_in_use_stream(void* stream) { current = static_cast<cudaStream_t>(stream); }
extern "C" void stand_in_capture(void* stream) { captured[static_cast<cudaStream_t>(stream)] = true; }
// Whether the capture was good.
extern "C" int stand_in_end_capture(void* stream) {
  const bool good = captured.at(static_cast<cudaStream_t>(stream));
  captured.erase(static_cast<cudaStream_t>(stream));
  return good;
}
extern "C" const char* stand_in_log() { return noted.c_str(); }
extern "C" int stand_in_synchronize(void* stream) {
  return cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
}
// A launch of a kernel that reads four numbers at once.
extern "C" int stand_in_launch(const unsigned* grid, unsigned threads, size_t bytes, void* stream,
                               const float* four) {
  cudaLaunchConfig_t config;
  config.gridDim = dim3(grid[0], grid[1], grid[2]);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  void (*kernel)(const float*) = [](const float* from) {
    volatile float4 four = *reinterpret_cast<const float4*>(from);
    (void)four;
  };
  return cudaLaunchKernelEx(&config, kernel, four);
}
