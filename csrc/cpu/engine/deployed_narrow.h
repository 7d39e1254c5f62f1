// Linear layers of a few rows whose weights are narrow: int8, or bfloat16 in a network that is float else.
#pragma once

#include "../simd/gemm.h"
#include "deployed.h"

namespace mfk {
namespace MFK_ISA {

// Outputs `from` to `to` - 1, multiples of 16, of so many rows; they go to the start of `out`'s rows.
struct NarrowLinear {
  const PlanLinear& linear;
  int64_t narrow;  // as of Plan
  const float* weights;
  int64_t from, to;
  Rows<float> in;
  int64_t rows;
  float* out;
  int64_t out_stride;
  bool added;  // to what is in the output already
};

// Without an activation.
void narrow_linear(const NarrowLinear& args);

// With what an epilogue of gemm.h does to sums and biases, in a pass of its own: tiles for every epilogue and
// every kind of weights would be many.
template <class Epilogue>
void narrow_linear(NarrowLinear args, Epilogue epilogue) {
  if constexpr (std::is_same<Epilogue, AddResidual<float>>::value) {
    args.added = true;  // where the residual is
    return narrow_linear(args);
  }
  narrow_linear(args);
  for (int64_t o = 0; o < args.to - args.from; o += kLanes<float>) {
    with_finish(epilogue, o, [&](auto finish) __attribute__((always_inline)) {
      for (int64_t p = 0; p < args.rows; ++p) {
        float* at = args.out + p * args.out_stride + o;
        store(at, finish(load(at), p));
      }
    });
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
