#include "../cpu/operators/global_response_norm.h"

#include "common.h"

namespace mfk {
namespace {

constexpr const char* kOp = "global_response_norm";

// What both passes share: everything (B, C), in double.
struct Call {
  Dtype dtype;
  int64_t batch, channels, pixels;
  bool channels_last, over_channels;
  double eps;
  Tensor holder;
  AnyMap x;
  Doubles gamma, beta, squares;

  Call(const Tensor& x_in, const Tensor& gamma_in, const Tensor& beta_in, const std::string& mean, double e)
      : eps(e) {
    check_axes(kOp, "x", x_in, 4, "(B, C, H, W)");
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
    squares.resize(batch * channels);
  }

  // Over the groups of channels of all samples: sums(begin, end) of tasks, then between(b, c0, c1, mean) the
  // norms and what is made of them, then apply(begin, end). A channel that is its own mean needs no other,
  // and is still in cache when it is applied; the mean over the channels waits for all of them.
  template <class Sums, class Between, class Apply>
  void run(Sums sums, Between between, Apply apply) const {
    const int64_t groups = blocks_of(channels, kResponseChannels), work = pixels * kResponseChannels;
    if (over_channels) {
      parallel_for(batch * groups, grain(work), sums);
      for (int64_t b = 0; b < batch; ++b) between(b, 0, channels, mean_norm(b));
      parallel_for(batch * groups, grain(work), apply);
      return;
    }
    parallel_for(batch * groups, grain(2 * work), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t c = task % groups * kResponseChannels;
        sums(task, task + 1);
        between(task / groups, c, std::min(c + kResponseChannels, channels), 0);
        apply(task, task + 1);
      }
    });
  }

 private:
  double mean_norm(int64_t b) const {
    long double sum = 0;
    for (int64_t c = 0; c < channels; ++c) sum += std::sqrt(squares[b * channels + c]);
    return static_cast<double>(sum / channels);
  }
};

Tensor forward(const Tensor& x, const Tensor& gamma, const Tensor& beta, std::string mean, double eps) {
  Call call(x, gamma, beta, mean, eps);
  Tensor y = empty_map(x), holder;
  Doubles scale(call.squares.size());
  const ResponseSumsArgs first{call.dtype, call.batch, call.channels,       call.pixels, call.x,
                               AnyMap{},   false,      call.squares.data(), nullptr,     nullptr};
  const ResponseApplyArgs last{call.dtype,
                               call.batch,
                               call.channels,
                               call.pixels,
                               call.x,
                               AnyMap{},
                               map_of(y, call.channels_last, holder),
                               false,
                               scale.data(),
                               nullptr,
                               call.beta.data()};
  call.run([&](int64_t begin, int64_t end) { response_sums(first, begin, end); },
           [&](int64_t b, int64_t c0, int64_t c1, double mean_norm) {
             for (int64_t c = c0; c < c1; ++c) {
               const double norm = std::sqrt(call.squares[b * call.channels + c]);
               const double below = (call.over_channels ? mean_norm : norm) + call.eps;
               scale[b * call.channels + c] = 1 + call.gamma[c] * norm / below;
             }
           },
           [&](int64_t begin, int64_t end) { response_apply(last, begin, end); });
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
  const int64_t channels = call.channels;
  const size_t count = call.squares.size();
  Doubles products(count), sums(count), scale(count), other(count);
  const ResponseSumsArgs first{call.dtype, call.batch,          channels,        call.pixels, call.x, g,
                               true,       call.squares.data(), products.data(), sums.data()};
  const ResponseApplyArgs last{call.dtype,
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
  call.run([&](int64_t begin, int64_t end) { response_sums(first, begin, end); },
           [&](int64_t b, int64_t c0, int64_t c1, double mean_norm) {
             double through_mean = 0;  // a channel's share of the gradient of the mean
             if (call.over_channels) {
               long double sum = 0;
               for (int64_t c = c0; c < c1; ++c) {
                 const int64_t i = b * channels + c;
                 sum -= call.gamma[c] * products[i] * std::sqrt(call.squares[i]);
               }
               const double below = mean_norm + call.eps;
               through_mean = static_cast<double>(sum / channels) / (below * below);
             }
             for (int64_t c = c0; c < c1; ++c) {
               const int64_t i = b * channels + c;
               const double norm = std::sqrt(call.squares[i]), dn = call.gamma[c] * products[i];
               const double below = (call.over_channels ? mean_norm : norm) + call.eps;
               const double dnorm =
                   call.over_channels ? dn / below + through_mean : dn * call.eps / (below * below);
               scale[i] = 1 + call.gamma[c] * norm / below;
               other[i] = norm == 0 ? 0 : dnorm / norm;
               products[i] *= norm / below;  // from here on a sample's part of dgamma
             }
           },
           [&](int64_t begin, int64_t end) { response_apply(last, begin, end); });
  Doubles grad_gamma(channels), grad_beta(channels);
  for (int64_t b = 0; b < call.batch; ++b) {
    for (int64_t c = 0; c < channels; ++c) {
      grad_gamma[c] += products[b * channels + c];
      grad_beta[c] += sums[b * channels + c];
    }
  }
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
