#include "isa.h"

#include <atomic>

namespace mfk {

bool isa_supported(Isa isa) {
#if defined(__x86_64__) && !defined(MFK_GENERIC_ONLY)
  switch (isa) {
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    default:
      return true;
  }
#else
  return isa == Isa::kGeneric;
#endif
}

static std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{isa_supported(Isa::kAvx512) ? Isa::kAvx512
                              : isa_supported(Isa::kAvx2) ? Isa::kAvx2
                                                          : Isa::kGeneric};
  return isa;
}

Isa isa() { return chosen().load(std::memory_order_relaxed); }

void set_isa(Isa isa) { chosen().store(isa, std::memory_order_relaxed); }

bool bf16_supported() {
#if defined(__x86_64__) && !defined(MFK_GENERIC_ONLY)
  return isa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace mfk
