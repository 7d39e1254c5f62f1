// Thread blocks of CUDA on a CPU: their threads are fibers, which run until they wait for their warp or their
// block. Warps take turns in an order that a seed decides, each as far as it can; shared memory begins as
// NaN.
//
// Kernels are compiled with -fsanitize=thread, whose calls at each access to memory end here, in the place of
// its own runtime, and with -fsanitize=alignment. So it is known of each byte of shared memory who touched it
// since the block's threads last met, whatever the numbers are. Two threads that touch a byte, one of which
// writes, are a race unless all threads of the block met between, or they are of one warp, which met.
#pragma once

#include <dlfcn.h>
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "numbers.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define MFK_UNWATCHED __attribute__((no_sanitize("thread", "alignment")))

struct Index {
  int x;
};
inline Index threadIdx, blockIdx;

namespace emulator {

constexpr int kMostThreads = 1024, kGuard = 256;  // bytes behind the shared memory that stay as they are
constexpr size_t kStack = 65536;

enum State { kReady, kWarp, kBlock, kDone };

// A thread that touched a byte, at this place in the code, when its block and its warp had met so often.
struct Access {
  int thread = -1;
  uint32_t block_met = 0, warp_met = 0;
  const char* place = nullptr;
};
// Of two bytes, less than which no number has: the last write; and of the reads since threads met two, by
// different threads if there are, of different warps if there are: whoever may not write now conflicts with
// one of them.
struct Pair {
  Access write, reads[2];
};
struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool started;
  State state;
  const void* sent;  // to the other threads of the warp
};
struct Block {
  std::vector<Fiber> fibers;
  std::vector<char> memory;  // shared, with what is before and behind it
  std::vector<Pair> pairs;
  // Plain ones: what is called for each access must not call what is itself watched.
  char *begin, *end, *shared;
  size_t bytes;
  Pair* shadow;
  uint32_t block_met, warp_met[kMostThreads / 32];
  ucontext_t first;
  jmp_buf scheduler;
  const std::function<void()>* kernel;
};
inline Block* block = nullptr;
inline bool failed = false, watching = false;
inline std::string failure;  // the first one
inline std::unique_ptr<char[]> stacks;

MFK_UNWATCHED inline void fail(const std::string& what) {
  if (failed) return;
  failed = true;
  failure = what;
}
MFK_UNWATCHED inline float* shared() { return reinterpret_cast<float*>(block->shared); }

// "in LIBRARY at OFFSET": the reader looks up its line.
MFK_UNWATCHED inline std::string place_of(const char* address) {
  Dl_info info;
  if (dladdr(address, &info) == 0) return "somewhere";
  char text[32];
  snprintf(text, sizeof text, "{%#lx}",
           static_cast<unsigned long>(address - 1 - static_cast<char*>(info.dli_fbase)));
  return text;
}
MFK_UNWATCHED inline std::string told(const char* verb, const Access& a) {
  return std::string(verb) + " by thread " + std::to_string(a.thread) + " (warp " +
         std::to_string(a.thread / 32) + ") at " + place_of(a.place);
}
// Nothing was between these two accesses that would order them.
MFK_UNWATCHED inline bool unordered(const Access& a, const Access& b) {
  if (a.thread < 0 || a.thread == b.thread || a.block_met != b.block_met) return false;
  return a.thread / 32 != b.thread / 32 || a.warp_met == b.warp_met;
}
MFK_UNWATCHED inline void race(size_t byte, const std::string& one, const std::string& other) {
  fail("race in shared memory, byte " + std::to_string(byte) + " of block " + std::to_string(blockIdx.x) +
       ": " + one + ", " + other);
}
MFK_UNWATCHED inline void note_read(Pair& pair, const Access& own) {
  if (pair.reads[0].thread < 0 || pair.reads[0].block_met != own.block_met) {
    pair.reads[0] = own;
    pair.reads[1] = Access();
  } else if (own.thread / 32 != pair.reads[0].thread / 32) {
    pair.reads[1] = own;
  } else if (own.warp_met != pair.reads[0].warp_met) {
    pair.reads[0] = own;  // what was before cannot conflict with the warp, and with others no less does
    if (pair.reads[1].thread / 32 == own.thread / 32) pair.reads[1] = Access();
  } else if (own.thread != pair.reads[0].thread && pair.reads[1].thread < 0) {
    pair.reads[1] = own;
  }
}
// By the thread that runs, of so many bytes.
MFK_UNWATCHED inline void touch(const void* address, size_t size, bool writes, const void* place) {
  if (!watching || failed) return;
  const char* at = static_cast<const char*>(address);
  if (at < block->begin || at >= block->end) return;
  const Access own{threadIdx.x, block->block_met, block->warp_met[threadIdx.x / 32],
                   static_cast<const char*>(place)};
  if (at < block->shared || at + size > block->shared + block->bytes) {
    return fail(told(
        writes ? "memory beside the shared one was written" : "memory beside the shared one was read", own));
  }
  const size_t first = at - block->shared;
  for (size_t i = first / 2 * 2; i < first + size; i += 2) {
    Pair& pair = block->shadow[i / 2];
    if (unordered(pair.write, own)) {
      return race(i, told("written", pair.write), told(writes ? "written" : "read", own));
    }
    if (!writes) {
      note_read(pair, own);
      continue;
    }
    for (const Access& read : pair.reads) {
      if (unordered(read, own)) return race(i, told("read", read), told("written", own));
    }
    pair.write = own;
  }
}

MFK_UNWATCHED inline void wait(State state) {
  Fiber& own = block->fibers[threadIdx.x];
  own.state = state;
  if (_setjmp(own.at) == 0) _longjmp(block->scheduler, 1);
}
// To the other threads of the warp, which wait for it.
MFK_UNWATCHED inline void send(const void* value) {
  block->fibers[threadIdx.x].sent = value;
  wait(kWarp);
}
MFK_UNWATCHED inline const void* sent(int thread) { return block->fibers[thread].sent; }
MFK_UNWATCHED inline void enter() {
  (*block->kernel)();
  wait(kDone);
}
// Until the thread waits. Contexts only begin fibers: to change them takes a call of the system each time.
MFK_UNWATCHED inline void run(int thread) {
  Fiber& fiber = block->fibers[thread];
  threadIdx.x = thread;
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = stacks.get() + thread * kStack;
  fiber.start.uc_stack.ss_size = kStack;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}
// Lets go those who wait for one another, if they all do: the warp's, or the block's.
MFK_UNWATCHED inline bool release(int begin, int end, State state) {
  for (int i = begin; i < end; ++i) {
    if (block->fibers[i].state != state) return false;
  }
  for (int i = begin; i < end; ++i) block->fibers[i].state = kReady;
  return true;
}
// Of 0 to count - 1. Seed 0: as they are, 1: backwards, others: any order.
MFK_UNWATCHED inline std::vector<int> order(int count, int seed, std::mt19937& random) {
  std::vector<int> places(count);
  for (int i = 0; i < count; ++i) places[i] = seed == 1 ? count - 1 - i : i;
  if (seed > 1) std::shuffle(places.begin(), places.end(), random);
  return places;
}

// A warp runs until it waits for the block. In the first two orders that is before the next one runs at all,
// as far apart as can be; in the others it may stand back whenever its threads have met.
MFK_UNWATCHED inline void run_warps(int threads, int seed, std::mt19937& random) {
  std::vector<int> left = order(threads / 32, seed, random);
  while (!left.empty()) {
    const size_t at = seed > 1 ? random() % left.size() : 0;
    const int first = 32 * left[at];
    bool goes_on = true;
    while (goes_on) {
      for (const int lane : order(32, seed, random)) {
        if (block->fibers[first + lane].state == kReady) run(first + lane);
      }
      goes_on = release(first, first + 32, kWarp);
      if (goes_on) ++block->warp_met[first / 32];
      if (goes_on && seed > 1 && random() % 2 == 0) break;
    }
    if (!goes_on) left.erase(left.begin() + at);
  }
}

MFK_UNWATCHED inline void run_block(int threads, int bytes, int seed, std::mt19937& random) {
  block->memory.assign(bytes + 2 * kGuard + 16, static_cast<char>(0xff));
  block->begin = block->memory.data(), block->end = block->begin + block->memory.size();
  block->shared = block->begin + kGuard;
  block->shared += (16 - reinterpret_cast<uintptr_t>(block->shared) % 16) % 16;
  block->bytes = bytes;
  block->pairs.assign(bytes / 2, Pair());
  block->shadow = block->pairs.data();
  block->block_met = 0;
  memset(block->warp_met, 0, sizeof block->warp_met);
  block->fibers.resize(threads);
  for (Fiber& fiber : block->fibers) fiber.state = kReady, fiber.started = false;
  do {
    run_warps(threads, seed, random);
    ++block->block_met;
  } while (release(0, threads, kBlock));
  for (const Fiber& fiber : block->fibers) {
    if (fiber.state != kDone) fail("threads waited for others that never came");
  }
}

// Runs the kernel for `blocks` blocks. What went wrong; empty: nothing. Accesses are watched with seeds above
// 1: which ones are ordered does not hang on when they come, and the watch takes longer than they do.
MFK_UNWATCHED inline const std::string& launch(int blocks, int threads, int bytes, int seed,
                                               const std::function<void()>& kernel) {
  std::mt19937 random(seed);
  if (stacks == nullptr) stacks.reset(new char[kMostThreads * kStack]);
  const auto own = std::make_unique<Block>();
  failed = false;
  failure.clear();
  for (const int at : order(blocks, seed, random)) {
    if (failed) break;
    blockIdx.x = at;
    own->kernel = &kernel;
    block = own.get();
    watching = seed > 1;
    run_block(threads, bytes, seed, random);
  }
  block = nullptr;
  watching = false;
  return failure;
}

}  // namespace emulator

// For Python: the last launch's.
extern "C" inline __attribute__((used)) const char* emulator_failure() { return emulator::failure.c_str(); }

// What compilers call.
#define MFK_WATCH(name, size, writes)                                                  \
  extern "C" MFK_UNWATCHED inline __attribute__((used)) void __tsan_##name(void* at) { \
    emulator::touch(at, size, writes, __builtin_return_address(0));                    \
  }
#define MFK_WATCH_BOTH(prefix, size)         \
  MFK_WATCH(prefix##read##size, size, false) \
  MFK_WATCH(prefix##write##size, size, true)
MFK_WATCH_BOTH(, 1)
MFK_WATCH_BOTH(, 2)
MFK_WATCH_BOTH(, 4)
MFK_WATCH_BOTH(, 8)
MFK_WATCH_BOTH(, 16)
MFK_WATCH_BOTH(unaligned_, 2)
MFK_WATCH_BOTH(unaligned_, 4)
MFK_WATCH_BOTH(unaligned_, 8)
MFK_WATCH_BOTH(unaligned_, 16)
#define MFK_WATCH_RANGE(name, writes)                                                               \
  extern "C" MFK_UNWATCHED inline __attribute__((used)) void __tsan_##name(void* at, size_t size) { \
    emulator::touch(at, size, writes, __builtin_return_address(0));                                 \
  }
MFK_WATCH_RANGE(read_range, false)
MFK_WATCH_RANGE(write_range, true)
extern "C" MFK_UNWATCHED inline __attribute__((used)) void __tsan_func_entry(void*) {}
extern "C" MFK_UNWATCHED inline __attribute__((used)) void __tsan_func_exit() {}
extern "C" MFK_UNWATCHED inline __attribute__((used)) void __tsan_init() {}
extern "C" MFK_UNWATCHED inline __attribute__((used)) void __tsan_vptr_update(void**, void*) {}
extern "C" MFK_UNWATCHED inline __attribute__((used)) void __tsan_vptr_read(void**) {}
extern "C" MFK_UNWATCHED inline __attribute__((used)) void __ubsan_handle_type_mismatch_v1(void*,
                                                                                           uintptr_t at) {
  emulator::Access own;
  own.thread = threadIdx.x, own.place = static_cast<const char*>(__builtin_return_address(0));
  emulator::fail("memory at " + std::to_string(at % 16) + " bytes behind a multiple of 16 was" +
                 emulator::told(" taken as more", own));
}

MFK_UNWATCHED inline void __syncthreads() { emulator::wait(emulator::kBlock); }
MFK_UNWATCHED inline void __syncwarp() { emulator::wait(emulator::kWarp); }
MFK_UNWATCHED inline float __shfl_xor_sync(unsigned, float value, int lanes) {
  emulator::send(&value);
  const float got = *static_cast<const float*>(emulator::sent(threadIdx.x ^ lanes));
  emulator::wait(emulator::kWarp);  // all have read what was sent
  return got;
}
