#include "../cpu/operators/mobile_to_former_attention.h"

#include "common.h"

namespace mfk {
namespace {

constexpr const char* kOp = "mobile_to_former_attention";

struct Call {
  MobileToFormerArgs args{};
  Tensor x, q, mask;

  Call(const Tensor& x_in, const Tensor& q_in, int64_t num_heads, std::optional<double> scale,
       const std::optional<Tensor>& mask_in) {
    check_axes(kOp, "x", x_in, 4, "(B, C, H, W)");
    check_axes(kOp, "q", q_in, 3, "(B, M, C)");
    args.dtype = dtype_of(kOp, x_in);
    args.batch = x_in.size(0);
    args.channels = x_in.size(1);
    args.pixels = x_in.size(2) * x_in.size(3);
    args.tokens = q_in.size(1);
    args.heads = num_heads;
    check_argument(kOp, "q", q_in, x_in, {args.batch, args.tokens, args.channels});
    check_heads(kOp, num_heads, args.channels, "the channels of x");
    STD_TORCH_CHECK(args.pixels >= 1, kOp, ": x must have at least one pixel, got ",
                    shape_text(shape_of(x_in)));
    if (mask_in.has_value()) {
      check_mask(kOp, *mask_in, x_in);
      mask = dense(*mask_in);
      args.mask = static_cast<const uint8_t*>(mask.data_ptr());
    }
    const int64_t depth = args.channels / num_heads;
    args.scale = scale.has_value() ? *scale : 1 / std::sqrt(static_cast<double>(depth));
    args.x = map_of(x_in, is_channels_last(x_in), x);
    q = dense(q_in);
    args.q = q.data_ptr();
    args.tile = tile_pixels(depth, args.dtype == Dtype::kDouble ? 8 : 4);
    const Splits splits = split_pixels(args.pixels, (1024 + args.tile - 1) / args.tile * args.tile);
    args.splits = splits.count;
    args.split = splits.size;
  }
  int64_t tasks() const { return args.batch * args.heads * args.splits; }
  int64_t work() const { return args.split * args.channels / args.heads * args.tokens; }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& q, int64_t num_heads,
                                           std::optional<double> scale, bool return_logits,
                                           const std::optional<Tensor>& mask) {
  Call call(x, q, num_heads, scale, mask);
  MobileToFormerArgs& args = call.args;
  const ScalarType sums = compute_type(x);
  Tensor out = empty(shape_of(q), x.scalar_type(), x);
  Tensor logits = return_logits
                      ? empty({args.batch, num_heads, args.tokens, x.size(2), x.size(3)}, x.scalar_type(), x)
                      : empty({0}, x.scalar_type(), x);
  Tensor softmax_stats = empty({args.batch, num_heads, args.tokens, 2}, sums, x);
  Tensor partial = empty({call.tasks(), args.tokens, 2 + args.channels / num_heads}, ScalarType::Double, x);
  args.logits = return_logits ? logits.data_ptr() : nullptr;
  args.partial = partial.mutable_data_ptr<double>();
  parallel_for(call.tasks(), grain(call.work()),
               [&](int64_t begin, int64_t end) { mobile_to_former_forward(args, begin, end); });
  MobileToFormerCombineArgs last{args.dtype,     args.channels,
                                 args.tokens,    args.heads,
                                 args.splits,    partial.const_data_ptr<double>(),
                                 out.data_ptr(), softmax_stats.data_ptr()};
  mobile_to_former_combine(last, 0, args.batch * num_heads);
  return {out, logits, softmax_stats};
}

std::tuple<Tensor, Tensor> backward(const std::optional<Tensor>& grad_out,
                                    const std::optional<Tensor>& grad_logits, const Tensor& x,
                                    const Tensor& q, const Tensor& softmax_stats, int64_t num_heads,
                                    std::optional<double> scale, const std::optional<Tensor>& mask) {
  Call call(x, q, num_heads, scale, mask);
  MobileToFormerArgs& args = call.args;
  STD_TORCH_CHECK(shape_of(softmax_stats) == std::vector<int64_t>({args.batch, num_heads, args.tokens, 2}) &&
                      softmax_stats.scalar_type() == compute_type(x) && softmax_stats.is_cpu(),
                  kOp, ": softmax_stats must be the one that the forward pass gave");
  Tensor given_out, given_logits, kept_stats = dense(softmax_stats);
  if (grad_out.has_value()) {
    check_argument(kOp, "grad_out", *grad_out, x, shape_of(q));
    given_out = dense(*grad_out);
    args.grad_out = given_out.data_ptr();
  }
  if (grad_logits.has_value()) {
    check_argument(kOp, "grad_logits", *grad_logits, x,
                   {args.batch, num_heads, args.tokens, x.size(2), x.size(3)});
    given_logits = dense(*grad_logits);
    args.grad_logits = given_logits.data_ptr();
  }
  const int64_t depth = args.channels / num_heads;
  Tensor grad_x = empty_map(x), holder;
  Tensor partial = empty({args.batch, num_heads, args.splits, args.tokens, depth}, ScalarType::Double, x);
  // A tile's rows are padded to whole vectors, of 16 numbers at most.
  args.room = args.tokens * std::min(args.split, (args.pixels + 15) / 16 * 16);
  const ScalarType sums = compute_type(x);
  Tensor weights = empty({call.tasks(), args.room}, sums, x),
         grad_weights = empty({call.tasks(), args.room}, sums, x);
  Tensor products = empty({call.tasks(), args.tokens}, ScalarType::Double, x);
  args.weights = weights.data_ptr();
  args.grad_weights = grad_weights.data_ptr();
  args.products = products.mutable_data_ptr<double>();
  args.softmax_stats = kept_stats.data_ptr();
  args.partial = partial.mutable_data_ptr<double>();
  args.grad_x = map_of(grad_x, is_channels_last(x), holder);
  parallel_for(call.tasks(), grain(call.work()),
               [&](int64_t begin, int64_t end) { mobile_to_former_backward_weights(args, begin, end); });
  parallel_for(call.tasks(), grain(call.work()),
               [&](int64_t begin, int64_t end) { mobile_to_former_backward(args, begin, end); });
  const Parts parts = {args.batch, num_heads, args.splits, args.tokens, depth};
  return {grad_x, sum_splits(partial, parts, x, shape_of(q))};
}

}  // namespace
}  // namespace mfk

STABLE_TORCH_LIBRARY_FRAGMENT(mfkernels, m) {
  m.def(
      "mobile_to_former_attention(Tensor x, Tensor q, int num_heads, float? scale=None, "
      "bool return_logits=False, Tensor? mask=None) -> (Tensor out, Tensor logits, Tensor softmax_stats)");
  m.def(
      "mobile_to_former_attention_backward(Tensor? grad_out, Tensor? grad_logits, Tensor x, Tensor q, "
      "Tensor softmax_stats, int num_heads, float? scale=None, Tensor? mask=None) -> (Tensor grad_x, Tensor "
      "grad_q)");
}

STABLE_TORCH_LIBRARY_IMPL(mfkernels, CPU, m) {
  m.impl("mobile_to_former_attention", TORCH_BOX(&mfk::forward));
  m.impl("mobile_to_former_attention_backward", TORCH_BOX(&mfk::backward));
}
