#include "deployed_narrow.h"

#if !defined(MFK_STORED_BF16)  // networks in bfloat16 have no narrow weights

namespace mfk {
namespace MFK_ISA {
namespace {

// sum * factor + bias + added[p * stride + o]; where nothing is added, both strides are zero.
struct Scaled {
  const float *bias, *factor, *added;
  int64_t stride, column;
  struct At {
    vec<float> bias, last, factor;
    const float* added;
    int64_t stride;
    MFK_INLINE vec<float> operator()(vec<float> sum, int64_t p) const {
      return sum * factor + last + load(added + p * stride);
    }
  };
  MFK_INLINE At at(int64_t o) const {
    return {vec<float>{}, load(bias + o), load(factor + o), added + o * column, stride};
  }
};

template <class W>
void run(const NarrowLinear& a) {
  const PlanLinear& l = a.linear;
  const auto* matrix = reinterpret_cast<const W*>(a.weights + l.weight) + a.from * l.inputs;
  const float* bias = a.weights + l.bias + a.from;
  const float nothing[kLanes<float>] = {};
  const Scaled scaled = a.added ? Scaled{bias, bias + l.outputs, a.out, a.out_stride, 1}
                                : Scaled{bias, bias + l.outputs, nothing, 0, 0};
  gemm(a.rows, a.in, WeightsOf<W>{matrix, a.to - a.from}, a.out, a.out_stride, scaled);
}

}  // namespace

void narrow_linear(const NarrowLinear& args) { args.narrow == 1 ? run<int8_t>(args) : run<bf16>(args); }

}  // namespace MFK_ISA
}  // namespace mfk

#endif
