// What all deployed networks share; mfkernels/deploy/cpu/packing.py packs their weights. Offsets count floats
// from the start of the weights.
#pragma once

#include "../../isa.h"
#include "../feature_map.h"
#include "../sizes.h"

namespace mfk {

// `scale` is zero, or, of an int8 matrix, the bits of a float by which inputs are multiplied before `zero` is
// added and they are rounded to 0..255. Where it is zero, `zero` is the number of the product in a
// calibration, or zero, too.
struct PlanLinear {
  int64_t inputs, outputs, weight, bias;  // outputs padded
  int64_t scale, zero;
};

// kDynamicRelu and kScaledRelu6 have factors in the state: of positive and of other values; of relu6.
enum PlanActivation : int64_t {
  kNoActivation,
  kGelu,
  kHardswish,
  kRelu,
  kRelu6,
  kDynamicRelu,
  kScaledRelu6,
  kHardsigmoid,
  kSilu,
  kSigmoid,
};

// Always inlined: a copy of its own could be the one compiled for AVX-512.
#define MFK_PLAN_FUNCTION static inline __attribute__((always_inline))

MFK_PLAN_FUNCTION float float_from_bits(int64_t bits) {
  const auto word = static_cast<uint32_t>(bits);
  float value;
  __builtin_memcpy(&value, &word, sizeof value);
  return value;
}

// As MFK_DECLARE_KERNEL, with one more for networks in bfloat16: those where `bf16`, an expression of
// `args`, is true.
#define MFK_DECLARE_DEPLOYED_KERNEL(name, Args, bf16)                                           \
  MFK_ON_X86(namespace avx512bf16 { void name(const Args& args, int64_t begin, int64_t end); }) \
  MFK_ON_ARM(namespace neonbf16 { void name(const Args& args, int64_t begin, int64_t end); })   \
  MFK_DECLARE_KERNEL_AFTER(MFK_ON_X86(if (bf16) return avx512bf16::name(args, begin, end);)     \
                               MFK_ON_ARM(if (bf16) return neonbf16::name(args, begin, end);),  \
                           name, Args)

// The same, with two more for networks in int8: where `int8`, an expression of `args`, is true. AVX-512
// without VNNI is not worth a copy: that for AVX2 runs.
#define MFK_DECLARE_INT8_KERNEL(name, Args, bf16, int8)                                                    \
  MFK_ON_X86(                                                                                              \
      namespace avx512bf16 {                                                                               \
        void name(const Args& args, int64_t begin, int64_t end);                                           \
      } namespace avx512vnni {                                                                             \
        void name(const Args& args, int64_t begin, int64_t end);                                           \
      } namespace avx2vnni { void name(const Args& args, int64_t begin, int64_t end); } namespace avx2 {   \
        void name(const Args& args, int64_t begin, int64_t end);                                           \
      })                                                                                                   \
  MFK_ON_ARM(                                                                                              \
      namespace neonbf16 { void name(const Args& args, int64_t begin, int64_t end); } namespace neoni8mm { \
        void name(const Args& args, int64_t begin, int64_t end);                                           \
      } namespace neondotprod { void name(const Args& args, int64_t begin, int64_t end); })                \
  MFK_DECLARE_KERNEL_AFTER(                                                                                \
      MFK_ON_ARM(if (bf16) return neonbf16::name(args, begin, end); if (int8) switch (isa()) {             \
        case Isa::kI8mm:                                                                                   \
          return neoni8mm::name(args, begin, end);                                                         \
        case Isa::kDotprod:                                                                                \
          return neondotprod::name(args, begin, end);                                                      \
        default:                                                                                           \
          break;                                                                                           \
      }) MFK_ON_X86(if (bf16) return avx512bf16::name(args, begin, end); if (int8) switch (isa()) {        \
        case Isa::kAmx:                                                                                    \
        case Isa::kAvx512Vnni:                                                                             \
          return avx512vnni::name(args, begin, end);                                                       \
        case Isa::kAvx2Vnni:                                                                               \
          return avx2vnni::name(args, begin, end);                                                         \
        case Isa::kAvx512:                                                                                 \
          return avx2::name(args, begin, end);                                                             \
        default:                                                                                           \
          break;                                                                                           \
      }),                                                                                                  \
      name, Args)

// A linear layer of a whole batch; no activation, or one up to kRelu6, or kSilu.
struct DeployedLinearArgs {
  bool bf16;
  int64_t narrow;  // as of Plan
  PlanLinear linear;
  PlanActivation activation;
  const float* weights;
  const float* in;  // (batch, in_stride)
  int64_t in_stride, batch;
  float* out;
  int64_t out_stride;
};

constexpr int64_t kOutputsTask = 32;  // outputs

// Tasks: one for kOutputsTask outputs.
MFK_DECLARE_DEPLOYED_KERNEL(deployed_linear, DeployedLinearArgs, args.bf16)

// A sample's map that is a result.
struct DeployedMapArgs {
  bool bf16;
  const void* in;  // (pixels, padded channels)
  int64_t pixels, channels;
  FeatureMap<float> out;
  int64_t sample;
};

constexpr int64_t kMapTask = 64;  // pixels

// Tasks: one for kMapTask pixels.
MFK_DECLARE_DEPLOYED_KERNEL(deployed_map, DeployedMapArgs, args.bf16)

}  // namespace mfk
