#include "../cpu/operators/former_to_mobile_attention.h"

#include "common.h"

namespace mfk {
namespace {

constexpr const char* kOp = "former_to_mobile_attention";

struct Call {
  FormerToMobileArgs args{};
  Tensor x, k, v;

  Call(const Tensor& x_in, const Tensor& k_in, const Tensor& v_in, int64_t num_heads,
       std::optional<double> scale) {
    check_axes(kOp, "x", x_in, 4, "(B, C, H, W)");
    check_axes(kOp, "k", k_in, 3, "(B, M, C)");
    args.dtype = dtype_of(kOp, x_in);
    args.batch = x_in.size(0);
    args.channels = x_in.size(1);
    args.pixels = x_in.size(2) * x_in.size(3);
    args.tokens = k_in.size(1);
    args.heads = num_heads;
    check_argument(kOp, "k", k_in, x_in, {args.batch, args.tokens, args.channels});
    check_argument(kOp, "v", v_in, x_in, {args.batch, args.tokens, args.channels});
    STD_TORCH_CHECK(args.tokens >= 1, kOp, ": k must hold at least one token, got M = 0");
    check_heads(kOp, num_heads, args.channels, "the channels of x");
    const int64_t depth = args.channels / num_heads;
    args.scale = scale.has_value() ? *scale : 1 / std::sqrt(static_cast<double>(depth));
    args.x = map_of(x_in, is_channels_last(x_in), x);
    k = dense(k_in);
    v = dense(v_in);
    args.k = k.data_ptr();
    args.v = v.data_ptr();
    args.tile = tile_pixels(2 * depth, args.dtype == Dtype::kDouble ? 8 : 4);
    const Splits splits = split_pixels(args.pixels, (1024 + args.tile - 1) / args.tile * args.tile);
    args.splits = splits.count;
    args.split = splits.size;
  }
  int64_t tasks() const { return args.pixels == 0 ? 0 : args.batch * args.heads * args.splits; }
  int64_t work() const { return args.split * args.channels / args.heads * args.tokens; }
};

Tensor forward(const Tensor& x, const Tensor& k, const Tensor& v, int64_t num_heads,
               std::optional<double> scale) {
  Call call(x, k, v, num_heads, scale);
  Tensor y = empty_map(x), holder;
  call.args.y = map_of(y, is_channels_last(x), holder);
  parallel_for(call.tasks(), grain(call.work()),
               [&](int64_t begin, int64_t end) { former_to_mobile_forward(call.args, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& x, const Tensor& k,
                                            const Tensor& v, int64_t num_heads, std::optional<double> scale) {
  Call call(x, k, v, num_heads, scale);
  check_argument(kOp, "grad_out", grad_out, x, shape_of(x));
  FormerToMobileArgs& args = call.args;
  const Parts parts = {args.batch, num_heads, args.splits, args.tokens, args.channels / num_heads};
  Tensor grad_x = empty_map(x), holder_g, holder_x;
  const std::vector<int64_t> shape = {parts.batch, parts.heads, parts.splits, parts.tokens, parts.depth};
  Tensor partial_k = empty(shape, ScalarType::Double, x), partial_v = empty(shape, ScalarType::Double, x);
  if (args.pixels == 0) {
    torch::stable::zero_(partial_k);
    torch::stable::zero_(partial_v);
  }
  args.partial_k = partial_k.mutable_data_ptr<double>();
  args.partial_v = partial_v.mutable_data_ptr<double>();
  args.grad_y = map_of(grad_out, is_channels_last(x), holder_g);
  args.grad_x = map_of(grad_x, is_channels_last(x), holder_x);
  parallel_for(call.tasks(), grain(call.work()),
               [&](int64_t begin, int64_t end) { former_to_mobile_backward(args, begin, end); });
  return {grad_x, sum_splits(partial_k, parts, x, shape_of(k)), sum_splits(partial_v, parts, x, shape_of(k))};
}

}  // namespace
}  // namespace mfk

STABLE_TORCH_LIBRARY_FRAGMENT(mfkernels, m) {
  m.def(
      "former_to_mobile_attention(Tensor x, Tensor k, Tensor v, int num_heads, float? scale=None) -> Tensor");
  m.def(
      "former_to_mobile_attention_backward(Tensor grad_out, Tensor x, Tensor k, Tensor v, int num_heads, "
      "float? scale=None) -> (Tensor grad_x, Tensor grad_k, Tensor grad_v)");
}

STABLE_TORCH_LIBRARY_IMPL(mfkernels, CPU, m) {
  m.impl("former_to_mobile_attention", TORCH_BOX(&mfk::forward));
  m.impl("former_to_mobile_attention_backward", TORCH_BOX(&mfk::backward));
}
