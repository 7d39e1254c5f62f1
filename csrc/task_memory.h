// Working memory of kernels' tasks.
#pragma once

#include <stddef.h>

namespace mfk {

// `bytes` of it, not initialised, aligned to a cache line; throws where there is no more. A thread keeps a
// stack: memory from the system would be new each time, every page of it a fault, longer than its use.
void* take_memory(size_t bytes);
// Gives it back, in the reverse order.
void give_memory(void* memory, size_t bytes);

// For tests: from now on memory given out, here and as tensors, is NaN until it is written.
__attribute__((visibility("default"))) void poison_memory(bool on);
bool memory_is_poisoned();

}  // namespace mfk
