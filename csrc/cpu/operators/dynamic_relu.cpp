// Coefficients that all pixels share.
#include "dynamic_relu.h"

#include "../simd/tile.h"
#include "split_gradient.h"

namespace mfk {
namespace MFK_ISA {
namespace {

// Calls f with the number of functions as a compile-time constant: 1, 2, or 0 for any other.
template <class F>
MFK_INLINE void with_functions(int64_t functions, F f) {
  if (functions == 2) {
    f(std::integral_constant<int, 2>());
  } else if (functions == 1) {
    f(std::integral_constant<int, 1>());
  } else {
    f(std::integral_constant<int, 0>());
  }
}

// The coefficients of one sample in the compute type, (K, padded channels); intercepts of zero if absent.
template <class T>
void load_coefficients(const void* source, int64_t b, const DynamicReluArgs& args, int64_t padded,
                       compute_t<T>* out) {
  const T* first = static_cast<const T*>(source) + b * args.functions * args.channels;
  for (int64_t k = 0; k < args.functions; ++k) {
    for (int64_t c = 0; c < padded; ++c) {
      out[k * padded + c] =
          source != nullptr && c < args.channels ? to_compute(first[k * args.channels + c]) : 0;
    }
  }
}

// Those of one channel, each in all lanes.
template <class T, class V>
MFK_INLINE void load_channel(const DynamicReluArgs& args, int64_t b, int64_t c, int64_t functions, V* slopes,
                             V* intercepts) {
  for (int64_t k = 0; k < functions; ++k) {
    const int64_t at = (b * functions + k) * args.channels + c;
    slopes[k] = splat(to_compute(static_cast<const T*>(args.slopes)[at]));
    intercepts[k] =
        args.intercepts == nullptr ? V{} : splat(to_compute(static_cast<const T*>(args.intercepts)[at]));
  }
}

template <int K, class C>
MFK_INLINE vec<C> largest(vec<C> x, const vec<C>* slopes, const vec<C>* intercepts, int64_t functions) {
  const int64_t count = K == 0 ? functions : K;
  vec<C> y = x * slopes[0] + intercepts[0];
  for (int64_t k = 1; k < count; ++k) y = maximum(y, x * slopes[k] + intercepts[k]);
  return y;
}

template <class T, int K>
void forward_rows(const DynamicReluArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int64_t n = kLanes<C>;
  const int64_t functions = K == 0 ? args.functions : K;
  // With a constant K arrays that the compiler keeps in registers.
  vec<C> few[2][K == 0 ? 1 : K];
  Buffer<vec<C>> many(K == 0 ? 2 * functions : 0);
  vec<C>* slopes = K == 0 ? many : few[0];
  vec<C>* intercepts = K == 0 ? many + functions : few[1];
  const auto x = args.x.as<const T>();
  const auto y = args.y.as<T>();
  const int64_t whole = args.pixels / n * n, rest = args.pixels - whole;
  int64_t b = begin / args.channels, c = begin % args.channels;
  for (int64_t task = begin; task < end; ++task) {
    load_channel<T>(args, b, c, functions, slopes, intercepts);
    const T* in = x.at(b, c, 0);
    T* out = y.at(b, c, 0);
    for (int64_t p = 0; p < whole; p += n) {
      store(out + p, largest<K, C>(load(in + p), slopes, intercepts, functions));
    }
    if (rest > 0) {
      store_part(out + whole, largest<K, C>(load_part(in + whole, rest), slopes, intercepts, functions),
                 rest);
    }
    if (++c == args.channels) {
      c = 0;
      ++b;
    }
  }
}

template <class T, int K>
void forward_columns(const DynamicReluArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int64_t n = kLanes<C>;
  const int64_t functions = K == 0 ? args.functions : K;
  const int64_t padded = round_up(args.channels, n);
  Buffer<C> slopes(functions * padded), intercepts(functions * padded);
  const auto x = args.x.as<const T>();
  const auto y = args.y.as<T>();
  int64_t loaded = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / args.pixels, p = task % args.pixels;
    if (b != loaded) {
      load_coefficients<T>(args.slopes, b, args, padded, slopes);
      load_coefficients<T>(args.intercepts, b, args, padded, intercepts);
      loaded = b;
    }
    const T* in = x.at(b, 0, p);
    T* out = y.at(b, 0, p);
    for (int64_t c = 0; c < args.channels; c += n) {
      const vec<C> value = load_upto(in + c, args.channels - c);
      vec<C> best = value * load(slopes + c) + load(intercepts + c);
      for (int64_t k = 1; k < functions; ++k) {
        best = maximum(best, value * load(slopes + k * padded + c) + load(intercepts + k * padded + c));
      }
      store_upto(out + c, best, args.channels - c);
    }
  }
}

// So many steps are summed in the compute type before the sum goes into a double.
constexpr int64_t kSteps = 4;

// The loop variables of the backward pass: with a constant K in arrays of their own, which the compiler keeps
// in registers, else in `work`.
template <class C, int K>
struct FunctionsRoom {
  static constexpr int64_t count = K;
  vec<C> slopes[K], intercepts[K], values[K], parts[K], slope_run[K], intercept_run[K];
  WideSum<C> slope_sums[K], intercept_sums[K];
  FunctionsRoom(int64_t, vec<C>*, WideSum<C>*) {}
};
template <class C>
struct FunctionsRoom<C, 0> {
  const int64_t count;
  vec<C>*slopes, *intercepts, *values, *parts, *slope_run, *intercept_run;
  WideSum<C>*slope_sums, *intercept_sums;
  FunctionsRoom(int64_t n, vec<C>* p, WideSum<C>* sums)
      : count(n),
        slopes(p),
        intercepts(p + n),
        values(p + 2 * n),
        parts(p + 3 * n),
        slope_run(p + 4 * n),
        intercept_run(p + 5 * n),
        slope_sums(sums),
        intercept_sums(sums + n) {}
};

template <class C, int K>
struct Functions : FunctionsRoom<C, K> {
  using Room = FunctionsRoom<C, K>;
  using Room::count, Room::slopes, Room::intercepts, Room::values, Room::parts, Room::slope_run,
      Room::intercept_run, Room::slope_sums, Room::intercept_sums;
  const bool with_intercepts;

  MFK_INLINE Functions(const DynamicReluArgs& args, vec<C>* work, WideSum<C>* sums)
      : Room(args.functions, work, sums), with_intercepts(args.intercepts != nullptr) {
    for (int64_t k = 0; k < count; ++k) {
      slope_run[k] = intercept_run[k] = vec<C>{};
      slope_sums[k] = intercept_sums[k] = WideSum<C>();
    }
  }

  // Takes x and the gradient of y, gives the gradient of x. Lanes outside `inside` count for nothing.
  template <class Inside>
  MFK_INLINE vec<C> step(vec<C> x, vec<C> g, Inside inside) {
    for (int64_t k = 0; k < count; ++k) values[k] = x * slopes[k] + intercepts[k];
    split_gradient<K, C>(g, values, parts, count);
    vec<C> out{};
    for (int64_t k = 0; k < count; ++k) {
      parts[k] = inside(parts[k]);
      out += slopes[k] * parts[k];
      slope_run[k] += x * parts[k];
      if (with_intercepts) intercept_run[k] += parts[k];
    }
    return out;
  }

  MFK_INLINE void end_run() {
    for (int64_t k = 0; k < count; ++k) {
      slope_sums[k].add(slope_run[k]);
      if (with_intercepts) intercept_sums[k].add(intercept_run[k]);
      slope_run[k] = intercept_run[k] = vec<C>{};
    }
  }
};

// Vectors of pixels, one channel: coefficients are constants of the loop.
template <class T, int K>
MFK_INLINE void backward_row(const DynamicReluArgs& args, int64_t b, int64_t c, int64_t p0, int64_t p1,
                             vec<compute_t<T>>* work, WideSum<compute_t<T>>* wide, double* slope_sums,
                             double* intercept_sums) {
  using C = compute_t<T>;
  constexpr int64_t n = kLanes<C>;
  Functions<C, K> f(args, work, wide);
  load_channel<T>(args, b, c, f.count, f.slopes, f.intercepts);
  const T* x = args.x.as<const T>().at(b, c, 0);
  const T* g = args.grad_y.as<const T>().at(b, c, 0);
  T* grad_x = args.grad_x.as<T>().at(b, c, 0);
  for (int64_t p = p0; p < p1;) {
    const int64_t run_end = p + kSteps * n < p1 ? p + kSteps * n : p1;
    for (; p + n <= run_end; p += n) {
      store(grad_x + p, f.step(load(x + p), load(g + p), [](vec<C> part) { return part; }));
    }
    if (p < run_end) {
      const int64_t rest = run_end - p;
      const mask<C> inside = first_lanes<C>(rest);
      const vec<C> out = f.step(load_part(x + p, rest), load_part(g + p, rest),
                                [&](vec<C> part) { return inside ? part : vec<C>{}; });
      store_part(grad_x + p, out, rest);
      p = run_end;
    }
    f.end_run();
  }
  for (int64_t k = 0; k < f.count; ++k) {
    slope_sums[k * args.channels + c] = sum_lanes<C>(f.slope_sums[k]);
    if (intercept_sums != nullptr) intercept_sums[k * args.channels + c] = sum_lanes<C>(f.intercept_sums[k]);
  }
}

// Vectors of channels, one after the other down the pixels.
template <class T, int K>
void backward_columns(const DynamicReluArgs& args, int64_t b, int64_t c, int64_t p0, int64_t p1,
                      vec<compute_t<T>>* work, WideSum<compute_t<T>>* wide, double* slope_sums,
                      double* intercept_sums) {
  using C = compute_t<T>;
  const int64_t rest = args.channels - c;
  Functions<C, K> f(args, work, wide);
  for (int64_t k = 0; k < f.count; ++k) {
    const int64_t at = (b * f.count + k) * args.channels + c;
    f.slopes[k] = load_upto(static_cast<const T*>(args.slopes) + at, rest);
    f.intercepts[k] =
        args.intercepts == nullptr ? vec<C>{} : load_upto(static_cast<const T*>(args.intercepts) + at, rest);
  }
  const auto x = args.x.as<const T>();
  const auto g = args.grad_y.as<const T>();
  const auto grad_x = args.grad_x.as<T>();
  for (int64_t p = p0; p < p1;) {
    const int64_t run_end = p + kSteps < p1 ? p + kSteps : p1;
    for (; p < run_end; ++p) {
      const vec<C> out = f.step(load_upto(x.at(b, c, p), rest), load_upto(g.at(b, c, p), rest),
                                [](vec<C> part) { return part; });
      store_upto(grad_x.at(b, c, p), out, rest);
    }
    f.end_run();
  }
  for (int64_t k = 0; k < f.count; ++k) {
    f.slope_sums[k].store_upto(slope_sums + k * args.channels + c, rest);
    if (intercept_sums != nullptr)
      f.intercept_sums[k].store_upto(intercept_sums + k * args.channels + c, rest);
  }
}

template <class T, int K>
void backward_shared(const DynamicReluArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int64_t n = kLanes<C>;
  const int64_t functions = args.functions, channels = args.channels;
  Buffer<vec<C>> work(6 * functions);
  Buffer<WideSum<C>> wide(2 * functions);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / args.splits, p0 = task % args.splits * args.split;
    const int64_t p1 = p0 + args.split < args.pixels ? p0 + args.split : args.pixels;
    double* slopes = args.partial_slopes + task * functions * channels;
    double* intercepts =
        args.partial_intercepts == nullptr ? nullptr : args.partial_intercepts + task * functions * channels;
    if (args.x.stride_p == 1) {
      for (int64_t c = 0; c < channels; ++c) {
        backward_row<T, K>(args, b, c, p0, p1, work, wide, slopes, intercepts);
      }
    } else {
      for (int64_t c = 0; c < channels; c += n) {
        backward_columns<T, K>(args, b, c, p0, p1, work, wide, slopes, intercepts);
      }
    }
  }
}

template <class T>
void forward(const DynamicReluArgs& args, int64_t begin, int64_t end) {
  with_functions(args.functions, [&](auto functions) {
    constexpr int k = decltype(functions)::value;
    if (args.x.stride_p == 1) {
      forward_rows<T, k>(args, begin, end);
    } else {
      forward_columns<T, k>(args, begin, end);
    }
  });
}

template <class T>
void backward(const DynamicReluArgs& args, int64_t begin, int64_t end) {
  with_functions(args.functions,
                 [&](auto functions) { backward_shared<T, decltype(functions)::value>(args, begin, end); });
}

}  // namespace

void dynamic_relu_forward(const DynamicReluArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto zero) { forward<decltype(zero)>(args, begin, end); });
}

void dynamic_relu_backward(const DynamicReluArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto zero) { backward<decltype(zero)>(args, begin, end); });
}

}  // namespace MFK_ISA
}  // namespace mfk
