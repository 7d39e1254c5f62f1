// Memory of deployed networks, kept from call to call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../huge_pages.h"

namespace mfk {
namespace {

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Block = std::unique_ptr<float, Free>;

Block allocate(int64_t floats) {
  const size_t bytes = floats * sizeof(float), huge = size_t{1} << 21;
  const size_t alignment = bytes >= huge ? huge : 64;
  Block block(static_cast<float*>(std::aligned_alloc(alignment, (bytes / alignment + 1) * alignment)));
  if (block == nullptr) throw std::runtime_error("deploy: no memory for " + std::to_string(bytes) + " bytes");
  if (bytes >= huge) advise_huge_pages(reinterpret_cast<uintptr_t>(block.get()), bytes);
  return block;
}

// Maps and token state of one call, taken from those that earlier calls gave back.
class Memory {
 public:
  explicit Memory(int64_t floats) : size_(floats) {
    std::lock_guard<std::mutex> lock(mutex());
    auto& blocks = pool();
    for (size_t i = 0; i < blocks.size(); ++i) {
      if (blocks[i].first < floats) continue;
      size_ = blocks[i].first;
      block_ = std::move(blocks[i].second);
      blocks.erase(blocks.begin() + i);
      return;
    }
    if (!blocks.empty()) blocks.pop_back();  // too small for today's images: replaced, not kept beside
    block_ = allocate(floats);
  }
  ~Memory() {
    std::lock_guard<std::mutex> lock(mutex());
    try {
      pool().emplace_back(size_, std::move(block_));
    } catch (const std::bad_alloc&) {  // not kept, then
    }
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  float* get() const { return block_.get(); }

 private:
  static std::mutex& mutex() {
    static std::mutex m;
    return m;
  }
  static std::vector<std::pair<int64_t, Block>>& pool() {
    static std::vector<std::pair<int64_t, Block>> blocks;
    return blocks;
  }
  int64_t size_;
  Block block_;
};

}  // namespace
}  // namespace mfk
