#include "isa.h"

#include <atomic>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mfk {

#if defined(__x86_64__) && !defined(MFK_GENERIC_ONLY)
// AMX: the processor multiplies bfloat16 and bytes in tiles, and the system lets this process use them, once it has
// asked. Not by __builtin_cpu_supports, which knows of them in newer compilers alone.
static bool may_use_tiles() {
  unsigned a, b, c, d;
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // bfloat16, tiles, bytes
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) return false;
#if defined(__linux__)
  constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool may = syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
  return may;
#else
  return false;
#endif
}
#endif

#if defined(__x86_64__) && !defined(MFK_GENERIC_ONLY)
// VNNI for vectors of 32 bytes, without AVX-512. Newer compilers alone know it, too.
static bool has_avx_vnni() {
  unsigned a, b, c, d;
  constexpr unsigned kAvxVnni = 1u << 4;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvxVnni) != 0;
}
#endif

bool isa_supported(Isa isa) {
#if defined(__x86_64__) && !defined(MFK_GENERIC_ONLY)
  switch (isa) {
    case Isa::kAmx:
      return isa_supported(Isa::kAvx512Vnni) && __builtin_cpu_supports("avx512bf16") && may_use_tiles();
    case Isa::kAvx512Vnni:
      return isa_supported(Isa::kAvx512) && __builtin_cpu_supports("avx512vnni");
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::kAvx2Vnni:
      return isa_supported(Isa::kAvx2) && has_avx_vnni();
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    default:
      return true;
  }
#else
  return isa == Isa::kGeneric;
#endif
}

static Isa widest() {
  for (Isa isa : {Isa::kAmx, Isa::kAvx512Vnni, Isa::kAvx512, Isa::kAvx2Vnni, Isa::kAvx2}) {
    if (isa_supported(isa)) return isa;
  }
  return Isa::kGeneric;
}

static std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{widest()};
  return isa;
}

Isa isa() { return chosen().load(std::memory_order_relaxed); }

void set_isa(Isa isa) { chosen().store(isa, std::memory_order_relaxed); }

bool bf16_supported() {
#if defined(__x86_64__) && !defined(MFK_GENERIC_ONLY)
  return isa() >= Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace mfk
