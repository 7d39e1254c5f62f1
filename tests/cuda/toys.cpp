// Small kernels, right ones and some with a defect, for tests/test_cuda.py: does the emulator see it?
#include "../../csrc/cuda/device.cuh"

namespace {

// Each number becomes its left neighbour: all write, and meet, before they read.
void shift(float* y, bool meet) {
  float* shared = emulator::shared();
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (meet) __syncthreads();
  y[threadIdx.x] = shared[threadIdx.x == 0 ? 63 : threadIdx.x - 1];
}
// All write the same number: no wrong value would show it.
void agree() { emulator::shared()[0] = 1; }
// Only threads of one warp have to do with one another.
void within_warps(float* y, bool meet) {
  float* shared = emulator::shared();
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (meet) __syncwarp();
  y[threadIdx.x] = shared[threadIdx.x ^ 1];
}
// What was read is written again.
void reuse(float* y, bool meet) {
  float* shared = emulator::shared();
  shared[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = shared[63 - threadIdx.x];
  if (meet) __syncthreads();
  shared[threadIdx.x] = 2;
}
void beyond(float* y) { y[threadIdx.x] = emulator::shared()[threadIdx.x + 1]; }
void crooked(float* y) {
  float four[4];
  if (threadIdx.x == 0) mfk::cuda::load4(y + 1, four), y[0] = four[0];
}
void alone() {
  if (threadIdx.x < 32) __syncthreads();
}

}  // namespace

// y: 64 numbers, aligned. 0: all went well.
extern "C" int toy(const char* name, float* y, int meet, int seed) {
  const auto is = [&](const char* other) { return strcmp(name, other) == 0; };
  const auto kernel = [&] {
    if (is("shift")) shift(y, meet);
    if (is("agree")) agree();
    if (is("within_warps")) within_warps(y, meet);
    if (is("reuse")) reuse(y, meet);
    if (is("beyond")) beyond(y);
    if (is("crooked")) crooked(y);
    if (is("alone")) alone();
  };
  return !emulator::launch(2, 64, 64 * sizeof(float), seed, kernel).empty();
}
