#include "../cpu/global_response_norm.h"

#include "common.h"

namespace mfk {
namespace {

constexpr const char* kOp = "global_response_norm";

// The norms of the channels, and what is made of them: everything (B, C), in double.
struct Call {
  Dtype dtype;
  int64_t batch, channels, pixels;
  bool channels_last, over_channels;
  double eps;
  Tensor holder;
  AnyMap x;
  std::vector<double> gamma, beta, norms, means, squares, products, sums;

  Call(const Tensor& x_in, const Tensor& gamma_in, const Tensor& beta_in, const std::string& mean, double e)
      : eps(e) {
    STD_TORCH_CHECK(x_in.dim() == 4, kOp, ": x must have 4 dimensions (B, C, H, W), got ", x_in.dim());
    STD_TORCH_CHECK(mean == "channels" || mean == "released", kOp,
                    ": mean must be 'channels' or 'released', got '", mean, "'");
    dtype = dtype_of(kOp, x_in);
    batch = x_in.size(0);
    channels = x_in.size(1);
    pixels = x_in.size(2) * x_in.size(3);
    check_argument(kOp, "gamma", gamma_in, x_in, {channels});
    check_argument(kOp, "beta", beta_in, x_in, {channels});
    channels_last = is_channels_last(x_in);
    over_channels = mean == "channels";
    x = map_of(x_in, channels_last, holder);
    gamma = doubles(gamma_in);
    beta = doubles(beta_in);
  }
  int64_t tasks() const { return batch * blocks_of(channels, kResponseChannels); }
  template <class F>
  void run(F f) const {
    torch::stable::parallel_for(0, tasks(), grain(pixels * kResponseChannels), f);
  }
  void measure(AnyMap g, bool both) {
    squares.resize(batch * channels);
    if (both) {
      products.resize(batch * channels);
      sums.resize(batch * channels);
    }
    const ResponseSumsArgs args{dtype, batch, channels,       pixels,          x,
                                g,     both,  squares.data(), products.data(), sums.data()};
    run([&](int64_t begin, int64_t end) { response_sums(args, begin, end); });
    norms.resize(batch * channels);
    means.resize(batch * channels);
    for (int64_t b = 0; b < batch; ++b) {
      long double sum = 0;
      for (int64_t c = 0; c < channels; ++c)
        sum += norms[b * channels + c] = std::sqrt(squares[b * channels + c]);
      for (int64_t c = 0; c < channels; ++c) {
        means[b * channels + c] =
            over_channels ? static_cast<double>(sum / channels) : norms[b * channels + c];
      }
    }
  }
};

Tensor forward(const Tensor& x, const Tensor& gamma, const Tensor& beta, std::string mean, double eps) {
  Call call(x, gamma, beta, mean, eps);
  Tensor y = empty_map(x), holder;
  call.measure(AnyMap{}, false);
  std::vector<double> scale(call.norms.size()), shift(call.norms.size());
  for (size_t i = 0; i < scale.size(); ++i) {
    const int64_t c = i % call.channels;
    scale[i] = 1 + call.gamma[c] * call.norms[i] / (call.means[i] + eps);
    shift[i] = call.beta[c];
  }
  const ResponseApplyArgs args{call.dtype,
                               call.batch,
                               call.channels,
                               call.pixels,
                               call.x,
                               AnyMap{},
                               map_of(y, call.channels_last, holder),
                               false,
                               scale.data(),
                               nullptr,
                               shift.data()};
  call.run([&](int64_t begin, int64_t end) { response_apply(args, begin, end); });
  return y;
}

// With n = norm / (mean + eps), per channel: dgamma = sum_b n sum(x g), dbeta = sum_b sum(g), dn = gamma
// sum(x g); then dnorm, and dx = (1 + gamma n) g + dnorm / norm x.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& x, const Tensor& gamma,
                                            const Tensor& beta, std::string mean, double eps) {
  Call call(x, gamma, beta, mean, eps);
  check_argument(kOp, "grad_out", grad_out, x, shape_of(x));
  Tensor grad_x = empty_map(x), holder_g, holder_x;
  const AnyMap g = map_of(grad_out, call.channels_last, holder_g);
  call.measure(g, true);
  const int64_t channels = call.channels;
  std::vector<double> grad_gamma(channels), grad_beta(channels), scale(call.norms.size()),
      other(call.norms.size());
  for (int64_t b = 0; b < call.batch; ++b) {
    long double through_mean = 0;  // the gradient of the mean
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = b * channels + c;
      const double below = call.means[i] + eps, norm = call.norms[i];
      grad_gamma[c] += norm / below * call.products[i];
      grad_beta[c] += call.sums[i];
      scale[i] = 1 + call.gamma[c] * norm / below;
      through_mean -= call.gamma[c] * call.products[i] * norm / (below * below);
    }
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = b * channels + c;
      const double below = call.means[i] + eps, norm = call.norms[i], dn = call.gamma[c] * call.products[i];
      const double dnorm = call.over_channels ? dn / below + static_cast<double>(through_mean / channels)
                                              : dn * eps / (below * below);
      other[i] = norm == 0 ? 0 : dnorm / norm;
    }
  }
  const ResponseApplyArgs args{call.dtype,
                               call.batch,
                               channels,
                               call.pixels,
                               g,
                               call.x,
                               map_of(grad_x, call.channels_last, holder_x),
                               true,
                               scale.data(),
                               other.data(),
                               nullptr};
  call.run([&](int64_t begin, int64_t end) { response_apply(args, begin, end); });
  return {grad_x, from_doubles(grad_gamma, x.scalar_type(), x), from_doubles(grad_beta, x.scalar_type(), x)};
}

}  // namespace
}  // namespace mfk

STABLE_TORCH_LIBRARY_FRAGMENT(mfkernels, m) {
  m.def(
      "global_response_norm(Tensor x, Tensor gamma, Tensor beta, str mean=\"channels\", float eps=1e-6) -> "
      "Tensor");
  m.def(
      "global_response_norm_backward(Tensor grad_out, Tensor x, Tensor gamma, Tensor beta, "
      "str mean=\"channels\", float eps=1e-6) -> (Tensor grad_x, Tensor grad_gamma, Tensor grad_beta)");
}

STABLE_TORCH_LIBRARY_IMPL(mfkernels, CPU, m) {
  m.impl("global_response_norm", TORCH_BOX(&mfk::forward));
  m.impl("global_response_norm_backward", TORCH_BOX(&mfk::backward));
}
