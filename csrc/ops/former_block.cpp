#include "former_call.h"

namespace mfk {
namespace {

constexpr const char* kOp = "former_block";
using Given = std::optional<Tensor>;

struct Call : FormerCall {
  Call(const Tensor& tokens, const Given (&given)[12], int64_t num_heads, const std::string& form, double eps)
      : FormerCall(tokens, given, num_heads, form, eps) {
    args.dtype = dtype_of(kOp, tokens);
    args.samples = std::max<int64_t>(1, 32 / std::max<int64_t>(args.tokens, 1));
  }
  template <class F>
  void run(F f) const {
    if (args.tokens == 0) return;
    const int64_t work = args.samples * args.tokens * args.width * (4 * args.width + 2 * args.hidden);
    parallel_for(blocks_of(args.batch, args.samples), grain(work), f);
  }
};

Tensor forward(const Tensor& tokens, const Tensor& qkv_weight, Given qkv_bias, const Tensor& proj_weight,
               Given proj_bias, const Tensor& norm1_weight, const Tensor& norm1_bias, Given fc1_weight,
               Given fc1_bias, Given fc2_weight, Given fc2_bias, Given norm2_weight, Given norm2_bias,
               int64_t num_heads, std::string form, double eps) {
  const Given given[] = {qkv_weight, qkv_bias, proj_weight, proj_bias, norm1_weight, norm1_bias,
                         fc1_weight, fc1_bias, fc2_weight,  fc2_bias,  norm2_weight, norm2_bias};
  Call call(tokens, given, num_heads, form, eps);
  Tensor y = empty(shape_of(tokens), tokens.scalar_type(), tokens);
  call.args.y = y.data_ptr();
  call.run([&](int64_t begin, int64_t end) { former_block_forward(call.args, begin, end); });
  return y;
}

std::vector<Tensor> backward(const Tensor& grad_out, const Tensor& tokens, const Tensor& qkv_weight,
                             Given qkv_bias, const Tensor& proj_weight, Given proj_bias,
                             const Tensor& norm1_weight, const Tensor& norm1_bias, Given fc1_weight,
                             Given fc1_bias, Given fc2_weight, Given fc2_bias, Given norm2_weight,
                             Given norm2_bias, int64_t num_heads, std::string form, double eps) {
  const Given given[] = {qkv_weight, qkv_bias, proj_weight, proj_bias, norm1_weight, norm1_bias,
                         fc1_weight, fc1_bias, fc2_weight,  fc2_bias,  norm2_weight, norm2_bias};
  Call call(tokens, given, num_heads, form, eps);
  check_argument(kOp, "grad_out", grad_out, tokens, shape_of(tokens));
  FormerArgs& args = call.args;
  const Tensor g = dense(grad_out);
  args.grad_y = g.data_ptr();
  std::vector<Tensor> grads = {empty(shape_of(tokens), tokens.scalar_type(), tokens)};
  args.grad_x = grads[0].data_ptr();
  for (int i = 0; i < 12; ++i) {
    const bool there = given[i].has_value();
    grads.push_back(empty_gradient(given[i], tokens));
    if (there) args.grads[i] = grads.back().data_ptr();
    if (there && i >= 6 && !args.ffn) torch::stable::zero_(grads.back());
  }
  Tensor work = empty({args.batch * args.tokens * former_work(args)}, compute_type(tokens), tokens);
  args.work = work.data_ptr();
  call.run([&](int64_t begin, int64_t end) { former_block_backward(args, begin, end); });
  int64_t tasks = 1;
  for (int array : {kGradQueries, kGradFirst, kGradHidden, kGradSecond}) {
    if (!args.ffn && (array == kGradHidden || array == kGradSecond)) continue;
    tasks += blocks_of(former_width(args, array), kFormerOutputs);
  }
  parallel_for(tasks, grain(kFormerOutputs * args.width * args.batch * args.tokens),
               [&](int64_t begin, int64_t end) { former_block_backward_weight(args, begin, end); });
  return grads;
}

}  // namespace
}  // namespace mfk

STABLE_TORCH_LIBRARY_FRAGMENT(mfkernels, m) {
  m.def(
      "former_block(Tensor tokens, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, Tensor? "
      "proj_bias, "
      "Tensor norm1_weight, Tensor norm1_bias, Tensor? fc1_weight, Tensor? fc1_bias, Tensor? fc2_weight, "
      "Tensor? fc2_bias, Tensor? norm2_weight, Tensor? norm2_bias, int num_heads, str form, float eps) -> "
      "Tensor");
  m.def(
      "former_block_backward(Tensor grad_out, Tensor tokens, Tensor qkv_weight, Tensor? qkv_bias, "
      "Tensor proj_weight, Tensor? proj_bias, Tensor norm1_weight, Tensor norm1_bias, Tensor? fc1_weight, "
      "Tensor? fc1_bias, Tensor? fc2_weight, Tensor? fc2_bias, Tensor? norm2_weight, Tensor? norm2_bias, "
      "int num_heads, str form, float eps) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(mfkernels, CPU, m) {
  m.impl("former_block", TORCH_BOX(&mfk::forward));
  m.impl("former_block_backward", TORCH_BOX(&mfk::backward));
}
