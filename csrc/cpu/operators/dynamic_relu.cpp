#include "dynamic_relu.h"

#include "../simd/tile.h"
#include "../simd/tile_gemm.h"

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

// ---- Coefficients shared by all pixels -------------------------------------------------------------

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

// g split evenly among the functions that attain the maximum; parts[k] is what function k gets. Where x is
// NaN no function equals the maximum, and the parts are NaN, as those of torch.amax are.
template <int K, class C>
MFK_INLINE void split_gradient(vec<C> g, const vec<C>* values, vec<C>* parts, int64_t functions) {
  const int64_t count = K == 0 ? functions : K;
  if constexpr (K == 2) {
    const vec<C> one = splat(C(1)), half = splat(C(0.5)), a = values[0], b = values[1];
    const vec<C> nan = splat(static_cast<C>(__builtin_nanf("")));
    const vec<C> first = a > b ? one : (a < b ? vec<C>{} : (a == b ? half : nan));
    parts[0] = first * g;
    parts[1] = (one - first) * g;
    return;
  }
  vec<C> best = values[0];
  for (int64_t k = 1; k < count; ++k) best = maximum(best, values[k]);
  vec<C> ties{};
  for (int64_t k = 0; k < count; ++k) {
    parts[k] = values[k] == best ? splat(C(1)) : vec<C>{};
    ties += parts[k];
  }
  const vec<C> share = g / ties;
  for (int64_t k = 0; k < count; ++k) parts[k] *= share;
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

// ---- Coefficients mixed per pixel --------------------------------------------------------------------

constexpr int64_t kPixels = 64;    // of a tile
constexpr int64_t kChannels = 16;  // of a tile: its coefficients fit the first-level cache

// Everything of one sample that the tiles share, and their working memory.
template <class T>
struct MixedSample {
  using C = compute_t<T>;
  const DynamicReluArgs& args;
  const int64_t coefficients;              // K * C
  Buffer<C> slopes, intercepts;            // (M, K, C)
  Buffer<C> attention;                     // (M, kPixels)
  Buffer<C> tile_slopes, tile_intercepts;  // (K * kChannels, kPixels)
  Buffer<C> x, y, g;                       // (kChannels, kPixels)
  int64_t loaded = -1;

  explicit MixedSample(const DynamicReluArgs& a)
      : args(a),
        coefficients(a.functions * a.channels),
        slopes(a.tokens * coefficients),
        intercepts(a.tokens * coefficients),
        attention(a.tokens * kPixels),
        tile_slopes(a.functions * kChannels * kPixels),
        tile_intercepts(a.functions * kChannels * kPixels),
        x(kChannels * kPixels),
        y(kChannels * kPixels),
        g(kChannels * kPixels) {}

  void load_sample(int64_t b) {
    if (b == loaded) return;
    loaded = b;
    const int64_t count = args.tokens * coefficients;
    for (int64_t i = 0; i < count; ++i) {
      slopes[i] = to_compute(static_cast<const T*>(args.slopes)[b * count + i]);
      if (args.intercepts != nullptr) {
        intercepts[i] = to_compute(static_cast<const T*>(args.intercepts)[b * count + i]);
      }
    }
  }

  void load_attention(int64_t b, int64_t p, int64_t count) {
    const T* source = static_cast<const T*>(args.attention) + b * args.tokens * args.pixels + p;
    for (int64_t m = 0; m < args.tokens; ++m) {
      for (int64_t j = 0; j < kPixels; j += kLanes<C>) {
        const int64_t rest = count - j;
        store(attention + m * kPixels + j,
              rest > 0 ? load_upto(source + m * args.pixels + j, rest) : vec<C>{});
      }
    }
  }

  // The coefficients of `rows` channels from c on, at the tile's pixels: row k * kChannels + i.
  void mix(int64_t c, int64_t rows, int64_t width) {
    for (int64_t k = 0; k < args.functions; ++k) {
      const Matrix<C> a{slopes + k * args.channels + c, 1, coefficients};
      multiply_pixels<C>(tile_slopes + k * kChannels * kPixels, kPixels, nullptr, 0, rows, a, args.tokens,
                         attention, kPixels, width);
      if (args.intercepts != nullptr) {
        const Matrix<C> t{intercepts + k * args.channels + c, 1, coefficients};
        multiply_pixels<C>(tile_intercepts + k * kChannels * kPixels, kPixels, nullptr, 0, rows, t,
                           args.tokens, attention, kPixels, width);
      }
    }
  }

  MFK_INLINE vec<C> slope(int64_t k, int64_t i, int64_t j) {
    return load(tile_slopes + (k * kChannels + i) * kPixels + j);
  }
  MFK_INLINE vec<C> intercept(int64_t k, int64_t i, int64_t j) {
    return args.intercepts == nullptr ? vec<C>{} : load(tile_intercepts + (k * kChannels + i) * kPixels + j);
  }
};

// Calls f(b, c, channels of the tile, p, pixels of the tile, their number in whole vectors).
template <class T, class Start, class F>
void for_tiles(const DynamicReluArgs& args, int64_t task, Start start, F f) {
  const int64_t b = task / args.splits, p0 = task % args.splits * args.split;
  const int64_t p1 = p0 + args.split < args.pixels ? p0 + args.split : args.pixels;
  for (int64_t p = p0; p < p1; p += kPixels) {
    const int64_t count = p1 - p < kPixels ? p1 - p : kPixels;
    start(b, p, count);
    for (int64_t c = 0; c < args.channels; c += kChannels) {
      const int64_t rows = args.channels - c < kChannels ? args.channels - c : kChannels;
      f(b, c, rows, p, count, round_up(count, kLanes<compute_t<T>>));
    }
  }
}

template <class T>
void forward_mixed(const DynamicReluArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int64_t n = kLanes<C>;
  MixedSample<T> sample(args);
  for (int64_t task = begin; task < end; ++task) {
    auto start = [&](int64_t b, int64_t p, int64_t count) {
      sample.load_sample(b);
      sample.load_attention(b, p, count);
    };
    for_tiles<T>(args, task, start,
                 [&](int64_t b, int64_t c, int64_t rows, int64_t p, int64_t count, int64_t width) {
                   sample.mix(c, rows, width);
                   const Tile<C> x = load_tile<T>(args.x.as<const T>(), b, c, rows, p, count, sample.x);
                   for (int64_t i = 0; i < rows; ++i) {
                     for (int64_t j = 0; j < width; j += n) {
                       const vec<C> value = load(x.data + i * x.stride + j);
                       vec<C> best = value * sample.slope(0, i, j) + sample.intercept(0, i, j);
                       for (int64_t k = 1; k < args.functions; ++k) {
                         best = maximum(best, value * sample.slope(k, i, j) + sample.intercept(k, i, j));
                       }
                       store(sample.y + i * kPixels + j, best);
                     }
                   }
                   store_tile<T>(args.y.as<T>(), b, c, rows, p, count, sample.y, kPixels);
                 });
  }
}

template <class T>
void backward_mixed(const DynamicReluArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int64_t n = kLanes<C>;
  const int64_t functions = args.functions, tokens = args.tokens, channels = args.channels;
  const bool with_intercepts = args.intercepts != nullptr;
  MixedSample<T> sample(args);
  const int64_t per_task = tokens * sample.coefficients;
  Buffer<C> slope_parts(functions * kChannels * kPixels), intercept_parts(functions * kChannels * kPixels);
  Buffer<C> grad_attention(tokens * kPixels);
  Buffer<vec<C>> values(functions), parts(functions);
  for (int64_t task = begin; task < end; ++task) {
    double* slope_sums = args.partial_slopes + task * per_task;
    double* intercept_sums = with_intercepts ? args.partial_intercepts + task * per_task : nullptr;
    memset(slope_sums, 0, per_task * sizeof(double));
    if (with_intercepts) memset(intercept_sums, 0, per_task * sizeof(double));
    auto start = [&](int64_t b, int64_t p, int64_t count) {
      sample.load_sample(b);
      sample.load_attention(b, p, count);
      memset(grad_attention, 0, tokens * kPixels * sizeof(C));
    };
    for_tiles<T>(args, task, start,
                 [&](int64_t b, int64_t c, int64_t rows, int64_t p, int64_t count, int64_t width) {
                   sample.mix(c, rows, width);
                   const Tile<C> x = load_tile<T>(args.x.as<const T>(), b, c, rows, p, count, sample.x);
                   const Tile<C> g = load_tile<T>(args.grad_y.as<const T>(), b, c, rows, p, count, sample.g);
                   for (int64_t i = 0; i < rows; ++i) {
                     for (int64_t j = 0; j < width; j += n) {
                       const vec<C> value = load(x.data + i * x.stride + j);
                       for (int64_t k = 0; k < functions; ++k) {
                         values[k] = value * sample.slope(k, i, j) + sample.intercept(k, i, j);
                       }
                       split_gradient<0, C>(load(g.data + i * g.stride + j), values, parts, functions);
                       vec<C> out{};
                       for (int64_t k = 0; k < functions; ++k) {
                         if (count - j < n) parts[k] = first_lanes<C>(count - j) ? parts[k] : vec<C>{};
                         out += sample.slope(k, i, j) * parts[k];
                         store(slope_parts + (k * kChannels + i) * kPixels + j, value * parts[k]);
                         store(intercept_parts + (k * kChannels + i) * kPixels + j, parts[k]);
                       }
                       store(sample.y + i * kPixels + j, out);
                     }
                   }
                   store_tile<T>(args.grad_x.as<T>(), b, c, rows, p, count, sample.y, kPixels);
                   for (int64_t k = 0; k < functions; ++k) {
                     const int64_t first = k * channels + c;
                     const C* slope_part = slope_parts + k * kChannels * kPixels;
                     const C* intercept_part = intercept_parts + k * kChannels * kPixels;
                     multiply_reduce<C>(slope_sums + first, sample.coefficients, 1, tokens, sample.attention,
                                        kPixels, rows, slope_part, kPixels, width);
                     multiply_pixels<C>(grad_attention, kPixels, grad_attention, kPixels, tokens,
                                        Matrix<C>{sample.slopes + first, sample.coefficients, 1}, rows,
                                        slope_part, kPixels, width);
                     if (with_intercepts) {
                       multiply_reduce<C>(intercept_sums + first, sample.coefficients, 1, tokens,
                                          sample.attention, kPixels, rows, intercept_part, kPixels, width);
                       multiply_pixels<C>(grad_attention, kPixels, grad_attention, kPixels, tokens,
                                          Matrix<C>{sample.intercepts + first, sample.coefficients, 1}, rows,
                                          intercept_part, kPixels, width);
                     }
                   }
                   if (c + rows == channels) {
                     const FeatureMap<T> map{static_cast<T*>(args.grad_attention), tokens * args.pixels,
                                             args.pixels, 1};
                     store_tile<T>(map, b, 0, tokens, p, count, grad_attention, kPixels);
                   }
                 });
  }
}

template <class T>
void forward(const DynamicReluArgs& args, int64_t begin, int64_t end) {
  if (args.tokens > 0) return forward_mixed<T>(args, begin, end);
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
  if (args.tokens > 0) return backward_mixed<T>(args, begin, end);
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
