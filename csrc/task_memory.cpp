#include "task_memory.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>

namespace mfk {
namespace {

// A thread keeps no more. None where memory errors are looked for: neighbours on a stack would hide them.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kMost = 0;
#else
constexpr size_t kMost = size_t{4} << 20;
#endif

void* allocate(size_t bytes) {
  void* memory = aligned_alloc(64, bytes);
  if (memory == nullptr) abort();
  return memory;
}

struct Stack {
  char* block = nullptr;
  size_t size = 0, used = 0;   // of the block
  size_t taken = 0, most = 0;  // in the block and beside it; so far

  ~Stack() { free(block); }
  void grow() {
    free(block);
    size = std::min(most, kMost);
    block = static_cast<char*>(allocate(size));
  }
};
thread_local Stack stack;

// Whole cache lines, and one to part the memory from its neighbour's.
size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64 + 64; }

std::atomic<bool> poisoned{false};

void* take(size_t bytes) {
  if (stack.taken == 0 && stack.size < std::min(stack.most, kMost)) stack.grow();
  stack.taken += bytes;
  stack.most = std::max(stack.most, stack.taken);
  if (stack.size - stack.used < bytes) return allocate(bytes);
  void* memory = stack.block + stack.used;
  stack.used += bytes;
  return memory;
}

}  // namespace

void* take_memory(size_t bytes) {
  void* memory = take(rounded(bytes));
  if (memory_is_poisoned()) memset(memory, 0xff, bytes);
  return memory;
}

void give_memory(void* memory, size_t bytes) {
  bytes = rounded(bytes);
  stack.taken -= bytes;
  char* const at = static_cast<char*>(memory);
  if (stack.block != nullptr && at >= stack.block && at < stack.block + stack.size) {
    stack.used -= bytes;
  } else {
    free(memory);
  }
}

void poison_memory(bool on) { poisoned = on; }
bool memory_is_poisoned() { return poisoned.load(std::memory_order_relaxed); }

}  // namespace mfk
