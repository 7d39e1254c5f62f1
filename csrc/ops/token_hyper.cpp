#include "../cpu/operators/token_hyper.h"

#include "common.h"

namespace mfk {
namespace {

constexpr const char* kOp = "token_hyper";
using Given = std::optional<Tensor>;

constexpr const char* kNames[] = {"weight1",       "bias1",       "weight2",       "bias2",
                                  "other_weight1", "other_bias1", "other_weight2", "other_bias2"};

struct Call {
  HyperArgs args{};
  Tensor token, parameters[8];

  Call(const Tensor& token_in, const Given (&given)[8], int64_t functions) {
    check_axes(kOp, "token", token_in, 2, "(B, d)");
    STD_TORCH_CHECK(functions == 1 || functions == 2, kOp, ": num_functions must be 1 or 2, got ", functions);
    args.dtype = dtype_of(kOp, token_in);
    args.batch = token_in.size(0);
    args.width = token_in.size(1);
    args.functions = functions;
    args.networks = given[4].has_value() ? 2 : 1;
    for (int64_t i = 0; i < args.networks; ++i) {
      HyperNet& net = args.nets[i];
      const void** pointers[] = {&net.weight1, &net.bias1, &net.weight2, &net.bias2};
      for (int j = 0; j < 4; ++j) {
        const char* name = kNames[4 * i + j];
        STD_TORCH_CHECK(given[4 * i + j].has_value(), kOp, ": ", name, " must be given");
        const Tensor& t = *given[4 * i + j];
        if (j % 2 == 0) check_axes(kOp, name, t, 2, j == 0 ? "(h, d)" : "(o, h)");
        if (j == 0) net.hidden = t.size(0);
        if (j == 2) net.outputs = t.size(0);
        const std::vector<int64_t> shapes[] = {
            {net.hidden, args.width}, {net.hidden}, {net.outputs, net.hidden}, {net.outputs}};
        check_argument(kOp, name, t, token_in, shapes[j]);
        parameters[4 * i + j] = dense(t);
        *pointers[j] = parameters[4 * i + j].data_ptr();
      }
      STD_TORCH_CHECK(net.outputs % functions == 0, kOp,
                      ": the outputs must be a multiple of num_functions, got ", net.outputs);
    }
    token = dense(token_in);
    args.token = token.data_ptr();
  }
  std::vector<int64_t> shape(int64_t i) const {
    return {args.batch, args.functions, args.nets[i].outputs / args.functions};
  }
  int64_t tasks() const { return blocks_of(args.batch, kHyperSamples); }
};

std::tuple<Tensor, Tensor> forward(const Tensor& token, const Tensor& weight1, const Tensor& bias1,
                                   const Tensor& weight2, const Tensor& bias2, Given other_weight1,
                                   Given other_bias1, Given other_weight2, Given other_bias2,
                                   int64_t functions) {
  const Given given[] = {weight1,       bias1,       weight2,       bias2,
                         other_weight1, other_bias1, other_weight2, other_bias2};
  Call call(token, given, functions);
  Tensor slopes[2] = {empty(call.shape(0), token.scalar_type(), token),
                      empty({0}, token.scalar_type(), token)};
  if (call.args.networks == 2) slopes[1] = empty(call.shape(1), token.scalar_type(), token);
  for (int i = 0; i < 2; ++i) call.args.nets[i].slopes = slopes[i].data_ptr();
  parallel_for(call.tasks(), 1,
               [&](int64_t begin, int64_t end) { token_hyper_forward(call.args, begin, end); });
  return {slopes[0], slopes[1]};
}

std::vector<Tensor> backward(const Tensor& grad_slopes, const Tensor& grad_other, const Tensor& token,
                             const Tensor& weight1, const Tensor& bias1, const Tensor& weight2,
                             const Tensor& bias2, Given other_weight1, Given other_bias1, Given other_weight2,
                             Given other_bias2, int64_t functions) {
  const Given given[] = {weight1,       bias1,       weight2,       bias2,
                         other_weight1, other_bias1, other_weight2, other_bias2};
  Call call(token, given, functions);
  HyperArgs& args = call.args;
  check_argument(kOp, "grad_slopes", grad_slopes, token, call.shape(0));
  if (args.networks == 2) check_argument(kOp, "grad_other", grad_other, token, call.shape(1));
  const Tensor g[] = {dense(grad_slopes), dense(grad_other)};
  std::vector<Tensor> grads = {empty(shape_of(token), token.scalar_type(), token)};
  args.grad_token = grads[0].data_ptr();
  int64_t tasks = 0;
  for (int i = 0; i < 8; ++i) {
    grads.push_back(empty_gradient(given[i], token));
    args.nets[i / 4].grads[i % 4] = grads.back().data_ptr();
    if (given[i].has_value() && i % 2 == 1) tasks += blocks_of(given[i]->numel(), kHyperOutputs);
  }
  for (int i = 0; i < 2; ++i) args.nets[i].grad_slopes = g[i].data_ptr();
  Tensor work = empty({args.batch * hyper_work(args)}, compute_type(token), token);
  args.work = work.data_ptr();
  parallel_for(call.tasks(), 1, [&](int64_t begin, int64_t end) { token_hyper_backward(args, begin, end); });
  parallel_for(tasks, grain(kHyperOutputs * args.width * args.batch),
               [&](int64_t begin, int64_t end) { token_hyper_backward_weight(args, begin, end); });
  return grads;
}

}  // namespace
}  // namespace mfk

STABLE_TORCH_LIBRARY_FRAGMENT(mfkernels, m) {
  m.def(
      "token_hyper(Tensor token, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, "
      "Tensor? other_weight1, Tensor? other_bias1, Tensor? other_weight2, Tensor? other_bias2, "
      "int num_functions) -> (Tensor slopes, Tensor other_slopes)");
  m.def(
      "token_hyper_backward(Tensor grad_slopes, Tensor grad_other, Tensor token, Tensor weight1, Tensor "
      "bias1, "
      "Tensor weight2, Tensor bias2, Tensor? other_weight1, Tensor? other_bias1, Tensor? other_weight2, "
      "Tensor? other_bias2, int num_functions) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(mfkernels, CPU, m) {
  m.impl("token_hyper", TORCH_BOX(&mfk::forward));
  m.impl("token_hyper_backward", TORCH_BOX(&mfk::backward));
}
