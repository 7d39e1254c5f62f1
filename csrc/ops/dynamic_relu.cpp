#include "../cpu/operators/dynamic_relu.h"

#include "common.h"

namespace mfk {
namespace {

constexpr const char* kOp = "dynamic_relu";

// The arguments of the forward pass; `holders` keeps copies of strided ones alive.
struct Call {
  DynamicReluArgs args{};
  Tensor x, slopes, intercepts, attention;
  std::vector<int64_t> coefficients;  // the shape of slopes

  Call(const Tensor& x_in, const Tensor& slopes_in, const std::optional<Tensor>& intercepts_in,
       const std::optional<Tensor>& attention_in) {
    check_axes(kOp, "x", x_in, 4, "(B, C, H, W)");
    args.dtype = dtype_of(kOp, x_in);
    args.batch = x_in.size(0);
    args.channels = x_in.size(1);
    args.pixels = x_in.size(2) * x_in.size(3);
    if (attention_in.has_value()) {
      check_axes(kOp, "attention", *attention_in, 4, "(B, M, H, W)");
      args.tokens = attention_in->size(1);
      STD_TORCH_CHECK(args.tokens >= 1, kOp, ": attention must have at least one token, got M = 0");
      check_argument(kOp, "attention", *attention_in, x_in,
                     {args.batch, args.tokens, x_in.size(2), x_in.size(3)});
      attention = dense(*attention_in);
      args.attention = attention.data_ptr();
    }
    const int64_t dims = attention_in.has_value() ? 4 : 3;
    check_axes(kOp, "slopes", slopes_in, dims, "(B, K, C), or with attention (B, M, K, C)");
    args.functions = slopes_in.size(dims - 2);
    STD_TORCH_CHECK(args.functions >= 1, kOp, ": slopes must hold at least one function, got K = 0");
    coefficients = {args.batch, args.functions, args.channels};
    if (attention_in.has_value()) coefficients.insert(coefficients.begin() + 1, args.tokens);
    check_argument(kOp, "slopes", slopes_in, x_in, coefficients);
    slopes = dense(slopes_in);
    args.slopes = slopes.data_ptr();
    if (intercepts_in.has_value()) {
      check_argument(kOp, "intercepts", *intercepts_in, x_in, coefficients);
      intercepts = dense(*intercepts_in);
      args.intercepts = intercepts.data_ptr();
    }
    args.x = map_of(x_in, is_channels_last(x_in), x);
  }
};

Tensor forward(const Tensor& x, const Tensor& slopes, const std::optional<Tensor>& intercepts,
               const std::optional<Tensor>& attention) {
  Call call(x, slopes, intercepts, attention);
  Tensor y = empty_map(x);
  if (y.numel() == 0) return y;
  DynamicReluArgs& args = call.args;
  Tensor y_holder;
  args.y = map_of(y, is_channels_last(x), y_holder);
  int64_t tasks, work;
  if (args.tokens > 0) {
    const Splits splits = split_pixels(args.pixels, 512);
    args.splits = splits.count;
    args.split = splits.size;
    tasks = args.batch * splits.count;
    work = splits.size * args.channels * args.tokens;
  } else {
    const bool rows = args.x.stride_p == 1;
    tasks = args.batch * (rows ? args.channels : args.pixels);
    work = rows ? args.pixels : args.channels;
  }
  const auto kernel = args.tokens > 0 ? mixed_relu_forward : dynamic_relu_forward;
  parallel_for(tasks, grain(work), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& x,
                                                    const Tensor& slopes,
                                                    const std::optional<Tensor>& intercepts,
                                                    const std::optional<Tensor>& attention) {
  Call call(x, slopes, intercepts, attention);
  check_argument(kOp, "grad_out", grad_out, x, shape_of(x));
  DynamicReluArgs& args = call.args;
  const bool channels_last = is_channels_last(x);
  const bool mixed = args.tokens > 0;
  Tensor grad_x = empty_map(x), holder_g, holder_x;
  Tensor grad_attention = empty(mixed ? shape_of(*attention) : std::vector<int64_t>{0}, x.scalar_type(), x);
  Tensor none = empty({0}, x.scalar_type(), x);
  int64_t per_sample = args.functions * args.channels * (mixed ? args.tokens : 1);
  // With attention the partial sums are kept smaller than an eighth of x.
  int64_t size = mixed ? std::max<int64_t>(512, 8 * args.tokens * args.functions) : 1024;
  const Splits splits = split_pixels(args.pixels, (size + 63) / 64 * 64);
  args.splits = splits.count;
  args.split = splits.size;
  Tensor partial_slopes = empty({args.batch, splits.count, per_sample}, ScalarType::Double, x);
  Tensor partial_intercepts =
      intercepts.has_value() ? empty({args.batch, splits.count, per_sample}, ScalarType::Double, x) : none;
  args.partial_slopes = partial_slopes.mutable_data_ptr<double>();
  args.partial_intercepts = intercepts.has_value() ? partial_intercepts.mutable_data_ptr<double>() : nullptr;
  args.grad_attention = mixed ? grad_attention.data_ptr() : nullptr;
  args.grad_y = map_of(grad_out, channels_last, holder_g);
  args.grad_x = map_of(grad_x, channels_last, holder_x);
  const auto kernel = mixed ? mixed_relu_backward : dynamic_relu_backward;
  parallel_for(args.batch * splits.count,
               grain(splits.size * args.channels * std::max<int64_t>(1, args.tokens)),
               [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  const Parts parts = {args.batch, 1, splits.count, 1, per_sample};
  return {grad_x, sum_splits(partial_slopes, parts, x, call.coefficients),
          intercepts.has_value() ? sum_splits(partial_intercepts, parts, x, call.coefficients) : none,
          grad_attention};
}

}  // namespace
}  // namespace mfk

STABLE_TORCH_LIBRARY_FRAGMENT(mfkernels, m) {
  m.def("dynamic_relu(Tensor x, Tensor slopes, Tensor? intercepts=None, Tensor? attention=None) -> Tensor");
  m.def(
      "dynamic_relu_backward(Tensor grad_out, Tensor x, Tensor slopes, Tensor? intercepts=None, "
      "Tensor? attention=None) -> (Tensor grad_x, Tensor grad_slopes, Tensor grad_intercepts, "
      "Tensor grad_attention)");
}

STABLE_TORCH_LIBRARY_IMPL(mfkernels, CPU, m) {
  m.impl("dynamic_relu", TORCH_BOX(&mfk::forward));
  m.impl("dynamic_relu_backward", TORCH_BOX(&mfk::backward));
}
