#include "former_block.h"

#include "../simd/elementary.h"
#include "token_rows.h"

namespace mfk {
namespace MFK_ISA {
namespace {

template <class C>
MFK_INLINE C dot(const C* a, const C* b, int64_t count) {
  vec<C> sum{};
  for (int64_t i = 0; i < count; i += kLanes<C>)
    sum += load_upto(a + i, count - i) * load_upto(b + i, count - i);
  return static_cast<C>(sum_lanes<C>(sum));
}
// Adds sum_i weights[i * step] * rows[i] to `to`.
template <class C>
void add_weighted(const C* weights, int64_t step, const C* rows, int64_t stride, int64_t count, C* to,
                  int64_t width) {
  for (int64_t c = 0; c < width; c += kLanes<C>) {
    vec<C> total{};
    for (int64_t i = 0; i < count;) {
      vec<C> sum{};  // short chains gather smaller errors
      const int64_t end = i + 8 < count ? i + 8 : count;
      for (; i < end; ++i) sum += weights[i * step] * load_upto(rows + i * stride + c, width - c);
      total += sum;
    }
    store_upto(to + c, load_upto(to + c, width - c) + total, width - c);
  }
}

// Some samples' tokens, and all that is made of them.
template <class T>
struct Former {
  using C = compute_t<T>;
  const FormerArgs& args;
  const int64_t tokens, rows;  // of a sample; of all that are done here
  const int64_t depth;         // of a head
  C* arrays[kFormerArrays];
  C *scales1, *scales2;

  // `work` has room for `all` rows, of which these are `count`, from row `first` on.
  Former(const FormerArgs& a, C* work, int64_t all, int64_t first, int64_t count)
      : args(a), tokens(a.tokens), rows(count), depth(a.width / a.heads) {
    for (int i = 0; i < kFormerArrays; ++i) {
      arrays[i] = work + first * padded(former_width(args, i));
      work += all * padded(former_width(args, i));
    }
    scales1 = work + first;
    scales2 = work + all + first;
  }
  TokenRows<C> at(int array) const {
    const int64_t width = former_width(args, array);
    return {arrays[array], rows, width, padded(width)};
  }
  static const T* as(const void* p) { return static_cast<const T*>(p); }
  TokenLinear<T> qkv() const {
    return {as(args.qkv_weight), as(args.qkv_bias), args.standard ? 3 * args.width : args.width, args.width};
  }
  TokenLinear<T> proj() const { return {as(args.proj_weight), as(args.proj_bias), args.width, args.width}; }
  TokenLinear<T> fc1() const { return {as(args.fc1_weight), as(args.fc1_bias), args.hidden, args.width}; }
  TokenLinear<T> fc2() const { return {as(args.fc2_weight), as(args.fc2_bias), args.width, args.hidden}; }

  void add(int from, int to) const { add(at(from), at(to)); }
  static void add(TokenRows<C> from, TokenRows<C> to) {
    for (int64_t i = 0; i < to.count * to.stride; i += kLanes<C>)
      store(to.data + i, load(from.data + i) + load(to.data + i));
  }

  // Queries, keys and values of a head: keys and values are the tokens themselves in the released form.
  struct Head {
    C *q, *k, *v;
    int64_t q_stride, k_stride;
  };
  Head head(int inputs, int queries, int64_t first, int64_t h) const {
    const int64_t q_stride = padded(former_width(args, queries)), stride = padded(former_width(args, inputs));
    C *q = arrays[queries] + first * q_stride + h * depth, *x = arrays[inputs] + first * stride + h * depth;
    if (args.standard) return {q, q + args.width, q + 2 * args.width, q_stride, q_stride};
    return {q, x, x, q_stride, stride};
  }
  // softmax of the scaled logits of token t.
  void weigh(const Head& head, int64_t t, C* weights) const {
    const C scale = static_cast<C>(1 / __builtin_sqrt(static_cast<double>(depth)));
    C top = -C(__builtin_inf());
    for (int64_t s = 0; s < tokens; ++s) {
      weights[s] = dot(head.q + t * head.q_stride, head.k + s * head.k_stride, depth) * scale;
      top = weights[s] > top ? weights[s] : top;
    }
    long double sum = 0;
    for (int64_t s = 0; s < tokens; ++s) sum += weights[s] = exp_scalar<C>(weights[s] - top);
    for (int64_t s = 0; s < tokens; ++s) weights[s] = static_cast<C>(weights[s] / sum);
  }
  template <class F>
  void for_heads(F f) const {
    for (int64_t first = 0; first < rows; first += tokens) {
      for (int64_t h = 0; h < args.heads; ++h) f(first, h);
    }
  }
  void attend() const {
    const TokenRows<C> out = at(kAttended);
    memset(out.data, 0, out.count * out.stride * sizeof(C));
    Buffer<C> weights(tokens);
    for_heads([&](int64_t first, int64_t h) {
      const Head in = head(kInput, kQueries, first, h);
      for (int64_t t = 0; t < tokens; ++t) {
        weigh(in, t, weights);
        add_weighted<C>(weights, 1, in.v, in.k_stride, tokens, out.row(first + t) + h * depth, depth);
      }
    });
  }
  // From kGradAttended to kGradQueries; in the released form the gradients of keys and values, the tokens, go
  // to kSecond, which is free by then.
  void attend_backward() const {
    const TokenRows<C> g = at(kGradAttended), grad_queries = at(kGradQueries);
    memset(grad_queries.data, 0, grad_queries.count * grad_queries.stride * sizeof(C));
    memset(arrays[kSecond], 0, rows * padded(former_width(args, kSecond)) * sizeof(C));
    const C scale = static_cast<C>(1 / __builtin_sqrt(static_cast<double>(depth)));
    Buffer<C> weights(tokens * tokens), grads(tokens * tokens);
    for_heads([&](int64_t first, int64_t h) {
      const Head in = head(kInput, kQueries, first, h), grad = head(kSecond, kGradQueries, first, h);
      const C* out = g.row(first) + h * depth;
      for (int64_t t = 0; t < tokens; ++t) {
        C *weight = weights + t * tokens, *logit = grads + t * tokens;
        weigh(in, t, weight);
        int64_t top = 0;
        for (int64_t s = 0; s < tokens; ++s) {
          logit[s] = dot(out + t * g.stride, in.v + s * in.k_stride, depth);
          top = weight[s] > weight[top] ? s : top;
        }
        // As in former_to_mobile_attention: counted from that of the largest weight.
        const C pivot = logit[top];
        long double mean = 0;
        for (int64_t s = 0; s < tokens; ++s) mean += weight[s] * (logit[s] -= pivot);
        // Rounded, the mean would be off alike for all tokens, and what is off alike does not cancel.
        const C high = static_cast<C>(mean), low = static_cast<C>(mean - high);
        for (int64_t s = 0; s < tokens; ++s) logit[s] = weight[s] * (logit[s] - high - low) * scale;
      }
      for (int64_t t = 0; t < tokens; ++t) {
        add_weighted<C>(grads + t * tokens, 1, in.k, in.k_stride, tokens, grad.q + t * grad.q_stride, depth);
        add_weighted<C>(grads + t, tokens, in.q, in.q_stride, tokens, grad.k + t * grad.k_stride, depth);
        add_weighted<C>(weights + t, tokens, out, g.stride, tokens, grad.v + t * grad.k_stride, depth);
      }
    });
  }

  void feed_forward() const {
    const TokenRows<C> hidden = at(kHidden), active = at(kActive);
    linear_forward(fc1(), at(kMiddle), hidden);
    for (int64_t i = 0; i < hidden.count * hidden.stride; i += kLanes<C>) {
      const vec<C> x = load(hidden.data + i);
      store(active.data + i, strict_gelu(x));
    }
    linear_forward(fc2(), active, at(kSecond));
  }
  // From the gradient of kSecond, in `g`, to kGradMiddle, to which `start` is added.
  void feed_forward_backward(int g, const C* start) const {
    const TokenRows<C> hidden = at(kHidden), grad = at(kGradHidden);
    linear_backward(fc2(), at(g), static_cast<const C*>(nullptr), grad);
    for (int64_t i = 0; i < hidden.count * hidden.stride; i += kLanes<C>) {
      store(grad.data + i, load(grad.data + i) * gelu_slope(load(hidden.data + i)));
    }
    linear_backward(fc1(), grad, start, at(kGradMiddle));
  }

  // Returns the array that holds the result.
  int forward(const T* x) const {
    if (args.standard) {
      load_rows(x, at(kFirst));
      normalise_rows(at(kFirst), args.eps, at(kFirstNorm), scales1);
      scale_rows(at(kFirstNorm), as(args.norm1_weight), as(args.norm1_bias), at(kInput));
    } else {
      load_rows(x, at(kInput));
    }
    linear_forward(qkv(), at(kInput), at(kQueries));
    attend();
    if (args.standard) {
      linear_forward(proj(), at(kAttended), at(kGradOut));
      add(kGradOut, kFirst);
      normalise_rows(at(kFirst), args.eps, at(kSecondNorm), scales2);
      scale_rows(at(kSecondNorm), as(args.norm2_weight), as(args.norm2_bias), at(kMiddle));
      feed_forward();
      add(kFirst, kSecond);
      return kSecond;
    }
    linear_forward(proj(), at(kAttended), at(kFirst));
    add(kInput, kFirst);
    normalise_rows(at(kFirst), args.eps, at(kFirstNorm), scales1);
    scale_rows(at(kFirstNorm), as(args.norm1_weight), as(args.norm1_bias), at(kMiddle));
    if (!args.ffn) return kMiddle;
    feed_forward();
    add(kMiddle, kSecond);
    normalise_rows(at(kSecond), args.eps, at(kSecondNorm), scales2);
    scale_rows(at(kSecondNorm), as(args.norm2_weight), as(args.norm2_bias), at(kSecond));
    return kSecond;
  }

  // kGradOut holds the gradient of the result, and is left alone. Returns the array of the tokens' gradient.
  int backward(const T* grad_y) const {
    load_rows(grad_y, at(kGradOut));
    const C* none = nullptr;
    if (args.standard) {
      feed_forward_backward(kGradOut, none);
      norm_backward(at(kSecondNorm), scales2, at(kGradMiddle), as(args.norm2_weight), arrays[kGradOut],
                    at(kGradFirst));
      linear_backward(proj(), at(kGradFirst), none, at(kGradAttended));
      attend_backward();
      linear_backward(qkv(), at(kGradQueries), none, at(kGradFirstNorm));
      norm_backward(at(kFirstNorm), scales1, at(kGradFirstNorm), as(args.norm1_weight), arrays[kGradFirst],
                    at(kGradSecond));
      return kGradSecond;
    }
    int g = kGradOut;
    if (args.ffn) {
      norm_backward(at(kSecondNorm), scales2, at(kGradOut), as(args.norm2_weight), none, at(kGradSecond));
      feed_forward_backward(kGradSecond, arrays[kGradSecond]);
      g = kGradMiddle;
    }
    // Of the sum that the first norm takes: kept for the gradient of proj; a copy becomes that of the tokens.
    norm_backward(at(kFirstNorm), scales1, at(g), as(args.norm1_weight), none, at(kGradSecondNorm));
    memcpy(arrays[kGradFirst], arrays[kGradSecondNorm],
           rows * padded(former_width(args, kGradFirst)) * sizeof(C));
    linear_backward(proj(), at(kGradSecondNorm), none, at(kGradAttended));
    attend_backward();
    linear_backward(qkv(), at(kGradQueries), static_cast<const C*>(arrays[kSecond]), at(kSecond));
    add(kSecond, kGradFirst);
    return kGradFirst;
  }
};

template <class F>
void for_samples(const FormerArgs& args, int64_t begin, int64_t end, F f) {
  const int64_t size = args.tokens * args.width;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task * args.samples, rest = args.batch - b;
    f(b, rest < args.samples ? rest : args.samples, b * size);
  }
}

template <class T>
void forward(const FormerArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  Buffer<C> work(args.samples * args.tokens * former_work(args));
  for_samples(args, begin, end, [&](int64_t, int64_t samples, int64_t at) {
    const Former<T> former(args, work, samples * args.tokens, 0, samples * args.tokens);
    const int result = former.forward(static_cast<const T*>(args.x) + at);
    store_rows(former.at(result), static_cast<T*>(args.y) + at);
  });
}

template <class T>
void backward(const FormerArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  for_samples(args, begin, end, [&](int64_t b, int64_t samples, int64_t at) {
    const Former<T> former(args, static_cast<C*>(args.work), args.batch * args.tokens, b * args.tokens,
                           samples * args.tokens);
    former.forward(static_cast<const T*>(args.x) + at);
    const int result = former.backward(static_cast<const T*>(args.grad_y) + at);
    store_rows(former.at(result), static_cast<T*>(args.grad_x) + at);
  });
}

template <class T>
void backward_weight(const FormerArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t all = args.batch * args.tokens;
  const Former<T> former(args, static_cast<C*>(args.work), all, 0, all);
  auto grad = [&](int i) { return static_cast<T*>(args.grads[i]); };
  struct Layer {
    int gradient, input, weight;
  };
  // Where the gradients of the layers' results and their inputs are.
  const Layer layers[] = {{kGradQueries, kInput, 0},
                          {args.standard ? kGradFirst : kGradSecondNorm, kAttended, 2},
                          {kGradHidden, kMiddle, 6},
                          {args.standard ? kGradOut : kGradSecond, kActive, 8}};
  for (int64_t task = begin; task < end; ++task) {
    int64_t number = task;
    bool found = false;
    for (int i = 0; i < (args.ffn ? 4 : 2) && !found; ++i) {
      const Layer& layer = layers[i];
      const int64_t outputs = former.at(layer.gradient).width;
      const int64_t count = blocks_of(outputs, kFormerOutputs);
      if (number < count) {
        const int64_t o = number * kFormerOutputs,
                      last = o + kFormerOutputs < outputs ? o + kFormerOutputs : outputs;
        linear_weight_gradient(former.at(layer.gradient), former.at(layer.input), o, last, grad(layer.weight),
                               grad(layer.weight + 1));
        found = true;
      }
      number -= count;
    }
    if (found) continue;
    int g1 = kGradFirstNorm, g2 = kGradMiddle;
    if (!args.standard) {
      g1 = args.ffn ? kGradMiddle : kGradOut;
      g2 = kGradOut;
    }
    norm_weight_gradient(former.at(kFirstNorm), former.at(g1), grad(4), grad(5));
    if (args.ffn) norm_weight_gradient(former.at(kSecondNorm), former.at(g2), grad(10), grad(11));
  }
}

}  // namespace

void former_block_forward(const FormerArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) { forward<decltype(element)>(args, begin, end); });
}

void former_block_backward(const FormerArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) { backward<decltype(element)>(args, begin, end); });
}

void former_block_backward_weight(const FormerArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) { backward_weight<decltype(element)>(args, begin, end); });
}

}  // namespace MFK_ISA
}  // namespace mfk
