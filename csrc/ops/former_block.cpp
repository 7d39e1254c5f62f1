#include "../cpu/former_block.h"

#include "common.h"

namespace mfk {
namespace {

constexpr const char* kOp = "former_block";
using Given = std::optional<Tensor>;

constexpr const char* kNames[] = {"qkv_weight",   "qkv_bias",   "proj_weight",  "proj_bias",
                                  "norm1_weight", "norm1_bias", "fc1_weight",   "fc1_bias",
                                  "fc2_weight",   "fc2_bias",   "norm2_weight", "norm2_bias"};

struct Call {
  FormerArgs args{};
  Tensor x, parameters[12];

  Call(const Tensor& tokens, const Given (&given)[12], int64_t num_heads, const std::string& form,
       double eps) {
    STD_TORCH_CHECK(tokens.dim() == 3, kOp, ": tokens must have 3 dimensions (B, T, d), got ", tokens.dim());
    STD_TORCH_CHECK(form == "released" || form == "standard", kOp,
                    ": form must be 'released' or 'standard', got '", form, "'");
    args.dtype = dtype_of(kOp, tokens);
    args.standard = form == "standard";
    args.ffn = given[6].has_value();
    args.batch = tokens.size(0);
    args.tokens = tokens.size(1);
    args.width = tokens.size(2);
    args.heads = num_heads;
    args.eps = eps;
    STD_TORCH_CHECK(args.width >= 1 && num_heads >= 1 && args.width % num_heads == 0, kOp,
                    ": num_heads must be positive and divide the width of tokens, got ", num_heads);
    STD_TORCH_CHECK(args.ffn || !args.standard, kOp, ": the standard form needs fc1_weight");
    if (args.ffn) {
      STD_TORCH_CHECK(given[6]->dim() == 2, kOp, ": fc1_weight must have 2 dimensions");
      args.hidden = given[6]->size(0);
    }
    const int64_t d = args.width, queries = args.standard ? 3 * d : d, hidden = args.hidden;
    const std::vector<int64_t> shapes[] = {{queries, d}, {queries}, {d, d},      {d}, {d}, {d},
                                           {hidden, d},  {hidden},  {d, hidden}, {d}, {d}, {d}};
    const void** pointers[] = {&args.qkv_weight,   &args.qkv_bias,   &args.proj_weight,  &args.proj_bias,
                               &args.norm1_weight, &args.norm1_bias, &args.fc1_weight,   &args.fc1_bias,
                               &args.fc2_weight,   &args.fc2_bias,   &args.norm2_weight, &args.norm2_bias};
    for (int i = 0; i < 12; ++i) {
      const bool optional = i == 1 || i == 3 || i == 7 || i == 9;  // biases of linear layers
      const bool needed = !optional && (i < 6 || args.ffn);
      STD_TORCH_CHECK(given[i].has_value() || !needed, kOp, ": ", kNames[i], " must be given");
      STD_TORCH_CHECK(i < 6 || args.ffn || !given[i].has_value(), kOp, ": ", kNames[i],
                      " must be left out where fc1_weight is");
      if (!given[i].has_value()) continue;
      check_argument(kOp, kNames[i], *given[i], tokens, shapes[i]);
      parameters[i] = torch::stable::contiguous(*given[i]);
      *pointers[i] = parameters[i].data_ptr();
    }
    x = torch::stable::contiguous(tokens);
    args.x = x.data_ptr();
    args.samples = std::max<int64_t>(1, 24 / std::max<int64_t>(args.tokens, 1));
  }
  template <class F>
  void run(F f) const {
    if (args.tokens == 0) return;
    const int64_t work = args.samples * args.tokens * args.width * (4 * args.width + 2 * args.hidden);
    torch::stable::parallel_for(0, blocks_of(args.batch, args.samples), grain(work), f);
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
  const Tensor g = torch::stable::contiguous(grad_out);
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
  torch::stable::parallel_for(
      0, tasks, grain(kFormerOutputs * args.width * args.batch * args.tokens),
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
