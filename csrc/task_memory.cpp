#include "task_memory.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

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
  if (memory == nullptr) {
    throw std::runtime_error("mfkernels: no memory for " + std::to_string(bytes) +
                             " bytes of working memory");
  }
  return memory;
}

struct Stack {
  char* block = nullptr;
  size_t size = 0, used = 0;   // of the block
  size_t taken = 0, most = 0;  // in the block and beside it; so far

  ~Stack() { free(block); }
  // Not at all where there is no memory for it.
  void grow() {
    free(block);
    block = static_cast<char*>(aligned_alloc(64, std::min(most, kMost)));
    size = block == nullptr ? 0 : std::min(most, kMost);
  }
};
thread_local Stack stack;

// Whole cache lines, and one to part the memory from its neighbour's.
size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64 + 64; }

std::atomic<bool> poisoned{false};

void* take(size_t bytes) {
  if (stack.taken == 0 && stack.size < std::min(stack.most, kMost)) stack.grow();
  void* memory;
  if (stack.size - stack.used < bytes) {
    memory = allocate(bytes);
  } else {
    memory = stack.block + stack.used;
    stack.used += bytes;
  }
  stack.taken += bytes;
  stack.most = std::max(stack.most, stack.taken);
  return memory;
}

}  // namespace

void* take_memory(size_t bytes) {
  void* memory = take(bytes > PTRDIFF_MAX ? PTRDIFF_MAX / 64 * 64 : rounded(bytes));
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
