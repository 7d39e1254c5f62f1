#include "activation.h"
#include "activation_pass.h"
#include "as_stored.h"
#include "deployed_narrow.h"

namespace mfk {
namespace MFK_ISA {

void deployed_linear(const DeployedLinearArgs& args, int64_t begin, int64_t end) {
  const PlanLinear& l = args.linear;
  const int64_t o = begin * kOutputsTask;
  const int64_t until = end * kOutputsTask < l.outputs ? end * kOutputsTask : l.outputs;
  const Weights w{args.weights + l.weight + o * weight_rows(l.inputs), until - o};
  Buffer<Stored> room(args.batch * padded(l.inputs));
  const Rows<Stored> rows = as_stored(args.in, args.batch, args.in_stride, l.inputs, room);
  auto run = [&](auto epilogue) {
    if constexpr (std::is_same<Stored, float>::value) {
      if (args.narrow > 0) {
        return narrow_linear(
            {l, args.narrow, args.weights, o, until, rows, args.batch, args.out + o, args.out_stride, false},
            epilogue);
      }
    }
    gemm(args.batch, rows, w, args.out + o, args.out_stride, epilogue);
  };
  run(AddBiasActivation{args.weights + l.bias + o, args.activation});
  if (!has_pass(args.activation)) return;
  for (int64_t b = 0; b < args.batch; ++b) {
    activation_pass(args.activation, args.out + b * args.out_stride + o, until - o);
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
