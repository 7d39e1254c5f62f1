// The choice of instruction set, made when the program runs.
#pragma once

#include <stdint.h>

namespace mfk {

// Those with VNNI are the ones before them, and its instructions for deployed networks in int8; kAmx is
// kAvx512Vnni, and AMX for deployed networks in bfloat16 and int8.
enum class Isa { kGeneric, kAvx2, kAvx2Vnni, kAvx512, kAvx512Vnni, kAmx };

// The one in use: at first the widest that this machine can run.
__attribute__((visibility("default"))) Isa isa();
// True if this build has it and this machine can run it.
__attribute__((visibility("default"))) bool isa_supported(Isa isa);
__attribute__((visibility("default"))) void set_isa(Isa isa);
// True if the instruction set in use is kAvx512 or one after it, and this machine multiplies bfloat16.
__attribute__((visibility("default"))) bool bf16_supported();
inline __attribute__((always_inline)) bool amx_in_use() { return isa() == Isa::kAmx; }

}  // namespace mfk

#if defined(__x86_64__) && !defined(MFK_GENERIC_ONLY)
#define MFK_ON_X86(...) __VA_ARGS__
#else
#define MFK_ON_X86(...)
#endif

// Declares the kernel `name`, one for each instruction set, and mfk::name, which calls the one in use.
// Kernels do the tasks begin to end-1 of a call; which tasks there are, each kernel's header says.
#define MFK_DECLARE_KERNEL(name, Args) MFK_DECLARE_KERNEL_AFTER(, name, Args)
// Likewise, with something to be tried first.
#define MFK_DECLARE_KERNEL_AFTER(first, name, Args)                                                  \
  namespace generic {                                                                                \
  void name(const Args& args, int64_t begin, int64_t end);                                           \
  }                                                                                                  \
  MFK_ON_X86(                                                                                        \
      namespace avx2 { void name(const Args& args, int64_t begin, int64_t end); } namespace avx512 { \
        void name(const Args& args, int64_t begin, int64_t end);                                     \
      })                                                                                             \
  inline void name(const Args& args, int64_t begin, int64_t end) {                                   \
    first switch (isa()) {                                                                           \
      MFK_ON_X86(case Isa::kAmx : case Isa::kAvx512Vnni : case Isa::kAvx512 : return avx512::name(   \
                     args, begin, end);                                                              \
                 case Isa::kAvx2Vnni : case Isa::kAvx2 : return avx2::name(args, begin, end);)       \
      default:                                                                                       \
        return generic::name(args, begin, end);                                                      \
    }                                                                                                \
  }
