#include "../cpu/operators/pointwise_conv_bn.h"

#include "common.h"

namespace mfk {
namespace {

constexpr const char* kOp = "pointwise_conv_bn";

// The backward pass is made of other operators, in mfkernels/operators/pointwise_conv_bn/operator.py.
Tensor forward(const Tensor& x, const Tensor& weight, const Tensor& gamma, const Tensor& beta,
               const Tensor& mean, const Tensor& variance, double eps, std::string activation) {
  check_axes(kOp, "x", x, 4, "(B, C, H, W)");
  check_axes(kOp, "weight", weight, 4, "(O, C, 1, 1)");
  STD_TORCH_CHECK(activation == "none" || activation == "gelu", kOp,
                  ": activation must be 'none' or 'gelu', got '", activation, "'");
  const Dtype dtype = dtype_of(kOp, x);
  const int64_t inputs = x.size(1), outputs = weight.size(0);
  STD_TORCH_CHECK(inputs * x.size(2) * x.size(3) > 0, kOp, ": x must have channels and pixels");
  check_argument(kOp, "weight", weight, x, {outputs, inputs, 1, 1});
  auto numbers = [&](const char* name, const Tensor& t) {
    check_argument(kOp, name, t, x, {outputs});
    return doubles(t);
  };
  auto factor = numbers("gamma", gamma);
  const auto bias = numbers("beta", beta), means = numbers("mean", mean),
             variances = numbers("variance", variance);
  for (int64_t o = 0; o < outputs; ++o) factor[o] /= std::sqrt(variances[o] + eps);
  const Tensor wide = dense(as_type(weight, compute_type(x)));
  Tensor y = empty({x.size(0), outputs, x.size(2), x.size(3)}, x.scalar_type(), x);
  Tensor holder_x, holder_y;
  const PointwiseConvBnArgs args{dtype,
                                 x.size(0),
                                 inputs,
                                 outputs,
                                 x.size(2) * x.size(3),
                                 map_of(x, false, holder_x),
                                 map_of(y, false, holder_y),
                                 activation == "gelu",
                                 wide.data_ptr(),
                                 means.data(),
                                 factor.data(),
                                 bias.data()};
  const int64_t tasks = args.batch * blocks_of(args.pixels, kPointwisePixels);
  parallel_for(tasks, grain(inputs * outputs * std::min(args.pixels, kPointwisePixels)),
               [&](int64_t begin, int64_t end) { pointwise_conv_bn(args, begin, end); });
  return is_channels_last(x) ? torch::stable::contiguous(y, MemoryFormat::ChannelsLast) : y;
}

}  // namespace
}  // namespace mfk

STABLE_TORCH_LIBRARY_FRAGMENT(mfkernels, m) {
  m.def(
      "pointwise_conv_bn(Tensor x, Tensor weight, Tensor gamma, Tensor beta, Tensor mean, Tensor variance, "
      "float eps=1e-5, str activation=\"none\") -> Tensor");
  m.def(
      "pointwise_conv_bn_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor gamma, Tensor beta, "
      "Tensor mean, Tensor variance, float eps=1e-5, str activation=\"none\") -> (Tensor grad_x, "
      "Tensor grad_weight, Tensor grad_gamma, Tensor grad_beta, Tensor grad_mean, Tensor grad_variance)");
}

STABLE_TORCH_LIBRARY_IMPL(mfkernels, CPU, m) { m.impl("pointwise_conv_bn", TORCH_BOX(&mfk::forward)); }
