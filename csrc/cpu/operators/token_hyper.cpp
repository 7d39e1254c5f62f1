#include "token_hyper.h"

#include "token_rows.h"

namespace mfk {
namespace MFK_ISA {
namespace {

// Some samples, and the arrays that are made of them.
template <class T>
struct Hyper {
  using C = compute_t<T>;
  const HyperArgs& args;
  TokenRows<C> token, grad_token;
  TokenRows<C> hidden[2], grad_hidden[2], outputs[2];  // outputs: later their gradients

  // `work` has room for `all` samples, of which these are `count`, from `first` on.
  Hyper(const HyperArgs& a, C* work, int64_t all, int64_t first, int64_t count) : args(a) {
    auto rows = [&](int64_t width) {
      const int64_t stride = padded(width);
      const TokenRows<C> taken{work + first * stride, count, width, stride};
      work += all * stride;
      return taken;
    };
    token = rows(args.width);
    grad_token = rows(args.width);
    for (int64_t i = 0; i < args.networks; ++i) {
      hidden[i] = rows(args.nets[i].hidden);
      grad_hidden[i] = rows(args.nets[i].hidden);
      outputs[i] = rows(args.nets[i].outputs);
    }
  }
  TokenLinear<T> first(int64_t i) const {
    const HyperNet& net = args.nets[i];
    return {static_cast<const T*>(net.weight1), static_cast<const T*>(net.bias1), net.hidden, args.width};
  }
  TokenLinear<T> second(int64_t i) const {
    const HyperNet& net = args.nets[i];
    return {static_cast<const T*>(net.weight2), static_cast<const T*>(net.bias2), net.outputs, net.hidden};
  }
  void forward(int64_t b) const {
    load_rows(static_cast<const T*>(args.token) + b * args.width, token);
    for (int64_t i = 0; i < args.networks; ++i) {
      linear_forward(first(i), token, hidden[i]);
      for (int64_t j = 0; j < hidden[i].count * hidden[i].stride; j += kLanes<C>) {
        const vec<C> x = load(hidden[i].data + j);
        store(hidden[i].data + j, x < 0 ? vec<C>{} : x);  // NaN for NaN
      }
      linear_forward(second(i), hidden[i], outputs[i]);
    }
  }
};

template <class F>
void for_samples(const HyperArgs& args, int64_t begin, int64_t end, F f) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task * kHyperSamples, rest = args.batch - b;
    f(b, rest < kHyperSamples ? rest : kHyperSamples);
  }
}

template <class T>
void forward(const HyperArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int64_t n = kLanes<C>;
  Buffer<C> work(kHyperSamples * hyper_work(args));
  for_samples(args, begin, end, [&](int64_t b, int64_t samples) {
    const Hyper<T> hyper(args, work, samples, 0, samples);
    hyper.forward(b);
    for (int64_t i = 0; i < args.networks; ++i) {
      const TokenRows<C> out = hyper.outputs[i];
      const int64_t channels = out.width / args.functions;
      T* slopes = static_cast<T*>(args.nets[i].slopes) + b * out.width;
      for (int64_t r = 0; r < samples; ++r) {
        for (int64_t k = 0; k < args.functions; ++k) {
          for (int64_t c = 0; c < channels; c += n) {
            const int64_t rest = channels - c, at = k * channels + c;
            const vec<C> u = load_upto(out.row(r) + at, rest) + C(3), six = splat(C(6));
            const vec<C> low = u < 0 ? vec<C>{} : u, theta = (low > six ? six : low) / C(6);
            store_upto(slopes + r * out.width + at, C(2) * theta - C(k == 0 ? 0 : 1), rest);
          }
        }
      }
    }
  });
}

// Through the hardsigmoid: a third of the gradient, strictly inside.
template <class T>
void backward(const HyperArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int64_t n = kLanes<C>;
  for_samples(args, begin, end, [&](int64_t b, int64_t samples) {
    const Hyper<T> hyper(args, static_cast<C*>(args.work), args.batch, b, samples);
    hyper.forward(b);
    for (int64_t i = 0; i < args.networks; ++i) {
      const TokenRows<C> out = hyper.outputs[i], hidden = hyper.hidden[i], grad = hyper.grad_hidden[i];
      const T* g = static_cast<const T*>(args.nets[i].grad_slopes) + b * out.width;
      for (int64_t r = 0; r < samples; ++r) {
        for (int64_t c = 0; c < out.width; c += n) {
          const vec<C> u = load(out.row(r) + c),
                       third = load_upto(g + r * out.width + c, out.width - c) / C(3);
          const mask<C> inside = (u > splat(C(-3))) & (u < splat(C(3)));
          store(out.row(r) + c, inside ? third : vec<C>{});
        }
      }
      linear_backward(hyper.second(i), out, static_cast<const C*>(nullptr), grad);
      for (int64_t j = 0; j < grad.count * grad.stride; j += n) {
        store(grad.data + j, load(hidden.data + j) > 0 ? load(grad.data + j) : vec<C>{});
      }
      const C* start = i == 0 ? nullptr : hyper.grad_token.data;
      linear_backward(hyper.first(i), grad, start, hyper.grad_token);
    }
    store_rows(hyper.grad_token, static_cast<T*>(args.grad_token) + b * args.width);
  });
}

template <class T>
void backward_weight(const HyperArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const Hyper<T> hyper(args, static_cast<C*>(args.work), args.batch, 0, args.batch);
  for (int64_t task = begin; task < end; ++task) {
    int64_t number = task;
    for (int64_t layer = 0; layer < 2 * args.networks; ++layer) {
      const int64_t i = layer / 2;
      const bool is_first = layer % 2 == 0;
      const TokenRows<C> g = is_first ? hyper.grad_hidden[i] : hyper.outputs[i];
      const int64_t count = blocks_of(g.width, kHyperOutputs);
      if (number >= 0 && number < count) {
        const int64_t o = number * kHyperOutputs,
                      last = o + kHyperOutputs < g.width ? o + kHyperOutputs : g.width;
        void* const* grads = args.nets[i].grads + (is_first ? 0 : 2);
        linear_weight_gradient(g, is_first ? hyper.token : hyper.hidden[i], o, last,
                               static_cast<T*>(grads[0]), static_cast<T*>(grads[1]));
      }
      number -= count;
    }
  }
}

}  // namespace

void token_hyper_forward(const HyperArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) { forward<decltype(element)>(args, begin, end); });
}

void token_hyper_backward(const HyperArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) { backward<decltype(element)>(args, begin, end); });
}

void token_hyper_backward_weight(const HyperArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) { backward_weight<decltype(element)>(args, begin, end); });
}

}  // namespace MFK_ISA
}  // namespace mfk
