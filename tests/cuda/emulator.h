// A thread block of CUDA on a CPU: its threads are fibers, which run until they wait for their warp or their
// block. Shared memory begins as NaN; warps run in either order, each as far as it can. So what is read
// before it is written, or without a barrier after it was, changes results or makes them NaN.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <limits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct float4 {
  float x, y, z, w;
};
struct Index {
  int x;
};
inline Index threadIdx, blockIdx;

namespace emulator {

enum State { kReady, kWarp, kBlock, kDone };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  State state;
  const void* sent;  // to the other threads of the warp
};
struct Block {
  std::vector<Fiber> fibers;
  std::vector<float> shared;
  ucontext_t scheduler;
  std::function<void()> kernel;
};
inline Block* block = nullptr;

inline float* shared() { return block->shared.data(); }
inline void wait(State state) {
  Fiber& own = block->fibers[threadIdx.x];
  own.state = state;
  swapcontext(&own.context, &block->scheduler);
}
// To the other threads of the warp, which wait for it.
inline void send(const void* value) {
  block->fibers[threadIdx.x].sent = value;
  wait(kWarp);
}
inline const void* sent(int thread) { return block->fibers[thread].sent; }
inline void enter() {
  block->kernel();
  wait(kDone);
}
// Lets go those who wait for one another, if they all do: the warp's, or the block's.
inline bool release(int begin, int end, State state) {
  for (int i = begin; i < end; ++i) {
    if (block->fibers[i].state != state) return false;
  }
  for (int i = begin; i < end; ++i) block->fibers[i].state = kReady;
  return true;
}

// Runs the kernel for `blocks` blocks. False: threads wait for such as never come, or memory beyond the
// shared one was written.
inline bool launch(int blocks, int threads, int floats, bool backwards, std::function<void()> kernel) {
  constexpr int kGuard = 64;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    Block own;
    block = &own;
    own.kernel = kernel;
    own.shared.assign(floats + kGuard, std::numeric_limits<float>::quiet_NaN());
    own.fibers.resize(threads);
    for (Fiber& fiber : own.fibers) {
      fiber.state = kReady;
      fiber.stack.resize(32768);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      makecontext(&fiber.context, enter, 0);
    }
    // A warp runs until it waits for the block, before the next one runs at all: as far apart as can be.
    do {
      for (int i = 0; i < threads; i += 32) {
        const int first = backwards ? threads - 32 - i : i;
        do {
          for (int lane = 0; lane < 32; ++lane) {
            threadIdx.x = first + (backwards ? 31 - lane : lane);
            Fiber& fiber = own.fibers[threadIdx.x];
            if (fiber.state == kReady) swapcontext(&own.scheduler, &fiber.context);
          }
        } while (release(first, first + 32, kWarp));
      }
    } while (release(0, threads, kBlock));
    for (const Fiber& fiber : own.fibers) {
      if (fiber.state != kDone) return false;
    }
    for (int i = 0; i < kGuard; ++i) {
      if (!isnan(own.shared[floats + i])) return false;
    }
  }
  return true;
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::kBlock); }
inline float __shfl_xor_sync(unsigned, float value, int lanes) {
  emulator::send(&value);
  const float got = *static_cast<const float*>(emulator::sent(threadIdx.x ^ lanes));
  emulator::wait(emulator::kWarp);  // all have read what was sent
  return got;
}
