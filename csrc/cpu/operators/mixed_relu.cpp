// Coefficients that are mixed for each pixel.
#include "../simd/tile.h"
#include "../simd/tile_gemm.h"
#include "dynamic_relu.h"
#include "split_gradient.h"

namespace mfk {
namespace MFK_ISA {
namespace {

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
void forward(const DynamicReluArgs& args, int64_t begin, int64_t end) {
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
void backward(const DynamicReluArgs& args, int64_t begin, int64_t end) {
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

}  // namespace

void mixed_relu_forward(const DynamicReluArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto zero) { forward<decltype(zero)>(args, begin, end); });
}

void mixed_relu_backward(const DynamicReluArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto zero) { backward<decltype(zero)>(args, begin, end); });
}

}  // namespace MFK_ISA
}  // namespace mfk
