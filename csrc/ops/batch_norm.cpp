#include "../cpu/operators/batch_norm.h"

#include "common.h"

namespace mfk {
namespace {

constexpr const char* kOp = "batch_norm";

struct Call {
  int64_t batch, channels, pixels;
  bool channels_last, gelu;
  Dtype dtype;
  Tensor holder;
  AnyMap x;
  Doubles weight, bias;

  Call(const Tensor& x_in, const Tensor& weight_in, const Tensor& bias_in, const std::string& activation) {
    check_axes(kOp, "x", x_in, 4, "(B, C, H, W)");
    STD_TORCH_CHECK(activation == "none" || activation == "gelu", kOp,
                    ": activation must be 'none' or 'gelu', got '", activation, "'");
    dtype = dtype_of(kOp, x_in);
    batch = x_in.size(0);
    channels = x_in.size(1);
    pixels = x_in.size(2) * x_in.size(3);
    weight = numbers("weight", weight_in, x_in);
    bias = numbers("bias", bias_in, x_in);
    gelu = activation == "gelu";
    channels_last = is_channels_last(x_in);
    x = map_of(x_in, channels_last, holder);
  }
  // A number for each channel, in x's dtype or, beside half precision, in float32.
  Doubles numbers(const char* name, const Tensor& t, const Tensor& like) const {
    STD_TORCH_CHECK(shape_of(t) == std::vector<int64_t>{channels}, kOp, ": ", name, " must have shape ",
                    shape_text({channels}), ", got ", shape_text(shape_of(t)));
    STD_TORCH_CHECK(t.scalar_type() == like.scalar_type() || t.scalar_type() == compute_type(like), kOp, ": ",
                    name, " must have the dtype of x, or float32 beside half precision");
    STD_TORCH_CHECK(t.is_cpu(), kOp, ": ", name, " must be on the CPU, as x is");
    return doubles(t);
  }
  // What the distances from the means are multiplied by.
  Doubles factors(const Doubles& variance, double eps) const {
    Doubles values(channels);
    for (int64_t c = 0; c < channels; ++c) values[c] = weight[c] / std::sqrt(variance[c] + eps);
    return values;
  }
  template <class F>
  void run(bool apart, F f) const {
    const int64_t size = norm_channels(x), groups = blocks_of(channels, size);
    const int64_t tasks = apart ? batch * groups : groups, samples = apart ? 1 : batch;
    parallel_for(tasks, grain(samples * pixels * size / 4), f);
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                           const std::optional<Tensor>& mean,
                                           const std::optional<Tensor>& variance, double eps,
                                           std::string activation) {
  const Call call(x, weight, bias, activation);
  STD_TORCH_CHECK(mean.has_value() == variance.has_value(), kOp,
                  ": mean and variance must both be given or both be left out");
  const bool measure = !mean.has_value();
  Doubles means(call.channels), variances(call.channels), factors(call.channels);
  if (!measure) {
    means = call.numbers("mean", *mean, x);
    variances = call.numbers("variance", *variance, x);
    factors = call.factors(variances, eps);
  }
  Tensor y = empty_map(x), holder;
  const BatchNormArgs args{call.dtype,
                           call.batch,
                           call.channels,
                           call.pixels,
                           call.x,
                           map_of(y, call.channels_last, holder),
                           measure,
                           call.gelu,
                           eps,
                           call.weight.data(),
                           call.bias.data(),
                           means.data(),
                           variances.data(),
                           factors.data()};
  call.run(!measure, [&](int64_t begin, int64_t end) { batch_norm(args, begin, end); });
  if (!measure) return {y, empty({0}, compute_type(x), x), empty({0}, compute_type(x), x)};
  return {y, from_doubles(means, compute_type(x), x), from_doubles(variances, compute_type(x), x)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_y, const std::optional<Tensor>& grad_mean, const std::optional<Tensor>& grad_variance,
    const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& variance,
    bool measured, double eps, std::string activation) {
  const Call call(x, weight, bias, activation);
  check_argument(kOp, "grad_y", grad_y, x, shape_of(x));
  const int64_t channels = call.channels;
  const auto means = call.numbers("mean", mean, x), variances = call.numbers("variance", variance, x);
  auto given = [&](const char* name, const std::optional<Tensor>& grad) {
    return grad.has_value() ? call.numbers(name, *grad, x) : Doubles(channels);
  };
  const auto mean_grads = given("grad_mean", grad_mean),
             variance_grads = given("grad_variance", grad_variance);
  const auto factors = call.factors(variances, eps);
  Doubles sums(channels), products(channels);
  Tensor grad_x = empty_map(x), holder_g, holder_x;
  const BatchNormBackwardArgs args{call.dtype,
                                   call.batch,
                                   channels,
                                   call.pixels,
                                   call.x,
                                   map_of(grad_y, call.channels_last, holder_g),
                                   map_of(grad_x, call.channels_last, holder_x),
                                   measured,
                                   call.gelu,
                                   eps,
                                   call.bias.data(),
                                   means.data(),
                                   variances.data(),
                                   factors.data(),
                                   mean_grads.data(),
                                   variance_grads.data(),
                                   sums.data(),
                                   products.data()};
  call.run(false, [&](int64_t begin, int64_t end) { batch_norm_backward(args, begin, end); });
  // With s^2 = variance + eps; of statistics that were given: dmean = -weight sum(d) / s, dvariance = -weight
  // sum(d (x - mean)) / (2 s^3).
  Doubles grad_weight(channels), to_mean(channels), to_variance(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double square = variances[c] + eps, deviation = std::sqrt(square);
    grad_weight[c] = products[c] / deviation;
    to_mean[c] = -call.weight[c] * sums[c] / deviation;
    to_variance[c] = -0.5 * call.weight[c] * products[c] / (deviation * square);
  }
  return {grad_x, from_doubles(grad_weight, weight.scalar_type(), x),
          from_doubles(sums, bias.scalar_type(), x), from_doubles(to_mean, mean.scalar_type(), x),
          from_doubles(to_variance, variance.scalar_type(), x)};
}

}  // namespace
}  // namespace mfk

STABLE_TORCH_LIBRARY_FRAGMENT(mfkernels, m) {
  m.def(
      "batch_norm(Tensor x, Tensor weight, Tensor bias, Tensor? mean=None, Tensor? variance=None, "
      "float eps=1e-5, str activation=\"none\") -> (Tensor y, Tensor mean, Tensor variance)");
  m.def(
      "batch_norm_backward(Tensor grad_y, Tensor? grad_mean, Tensor? grad_variance, Tensor x, Tensor weight, "
      "Tensor bias, Tensor mean, Tensor variance, bool measured, float eps=1e-5, str activation=\"none\") -> "
      "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_mean, Tensor grad_variance)");
}

STABLE_TORCH_LIBRARY_IMPL(mfkernels, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&mfk::forward));
  m.impl("batch_norm_backward", TORCH_BOX(&mfk::backward));
}
