#include "modulation_attention.h"

#include "../simd/softmax.h"
#include "../simd/tile.h"
#include "../simd/tile_gemm.h"

namespace mfk {
namespace MFK_ISA {
namespace {

constexpr int64_t kTile = kModulationTile;

template <class C>
MFK_INLINE vec<C> sigmoid(vec<C> x) {
  return C(1) / (C(1) + exp(-x));
}

// A sample's window, and where its pixels are.
struct Window {
  const ModulationArgs& args;
  int64_t index, b, row, column;  // of its first pixel
  int64_t pixels;

  Window(const ModulationArgs& a, int64_t i)
      : args(a),
        index(i),
        b(i / (a.windows_x * a.windows_y)),
        row(i / a.windows_x % a.windows_y * a.window_h),
        column(i % a.windows_x * a.window_w),
        pixels(a.window_h * a.window_w) {}

  int64_t tile_at(int64_t first) const { return pixels - first < kTile ? pixels - first : kTile; }
  // Calls f(i, p, count) for the runs that pixels `first` to first + count - 1 of the window are: the run's
  // place among them, its first pixel in the map, and its length.
  template <class F>
  void for_runs(int64_t first, int64_t count, F f) const {
    if (args.window_w == args.width) return f(0, row * args.width + first, count);
    for (int64_t i = 0; i < count;) {
      const int64_t y = (first + i) / args.window_w, x = (first + i) % args.window_w;
      const int64_t rest = args.window_w - x, run = rest < count - i ? rest : count - i;
      f(i, (row + y) * args.width + column + x, run);
      i += run;
    }
  }
  // (channels, stride) from a map; columns beyond the last whole vector of `count` are not written.
  template <class T, class C>
  void load_pixels(const AnyMap& map, int64_t channels, int64_t first, int64_t count, C* out, int64_t stride,
                   C* scratch) const {
    for_runs(first, count, [&](int64_t i, int64_t p, int64_t run) {
      if (run == count) return copy_tile<T>(map.as<const T>(), b, 0, channels, p, run, out, stride);
      const Tile<C> tile = load_tile<T>(map.as<const T>(), b, 0, channels, p, run, scratch);
      for (int64_t c = 0; c < channels; ++c) {
        memcpy(out + c * stride + i, tile.data + c * tile.stride, run * sizeof(C));
      }
    });
  }
  template <class T, class C>
  void store_pixels(const AnyMap& map, int64_t channels, int64_t first, int64_t count, const C* values,
                    int64_t stride, C* scratch) const {
    for_runs(first, count, [&](int64_t i, int64_t p, int64_t run) {
      if (run == count) return store_tile<T>(map.as<T>(), b, 0, channels, p, run, values, stride);
      for (int64_t c = 0; c < channels; ++c)
        memcpy(scratch + c * stride, values + c * stride + i, run * sizeof(C));
      store_tile<T>(map.as<T>(), b, 0, channels, p, run, scratch, stride);
    });
  }
};

// Pixels of a map, (channels, stride).
template <class C>
struct Pixels {
  Buffer<C> data;
  int64_t channels, stride;

  Pixels(int64_t c, int64_t count)
      : data(c * round_up(count, kTile)), channels(c), stride(round_up(count, kTile)) {
    clear();
  }
  void clear() { memset(static_cast<C*>(data), 0, channels * stride * sizeof(C)); }
  template <class T>
  void load_from(const Window& window, const AnyMap& map, int64_t first, int64_t count, C* scratch) {
    window.load_pixels<T>(map, channels, first, count, static_cast<C*>(data), stride, scratch);
  }
  template <class T>
  void store_to(const Window& window, const AnyMap& map, int64_t first, int64_t count, C* scratch) {
    window.store_pixels<T>(map, channels, first, count, static_cast<const C*>(data), stride, scratch);
  }
  template <class F>
  void apply(F f) {
    for (int64_t i = 0; i < channels * stride; i += kLanes<C>) store(data + i, f(load(data + i)));
  }
  Matrix<C> matrix() { return {data, stride, 1}; }      // (channels, pixels)
  Matrix<C> transposed() { return {data, 1, stride}; }  // (pixels, channels)
};

// A tile of queries in the lanes, and what the keys make of it.
template <class T>
struct Queries {
  using C = compute_t<T>;
  const ModulationArgs& args;
  Pixels<C> k, v;              // of the whole window; v as the attention takes it
  Pixels<C> q, gate, context;  // of the tile
  Buffer<C> weights;           // (pixels, kTile): softmax(scale k^T q)
  Buffer<C> scratch;
  int64_t loaded = -1, width = 0;  // the window; the tile's queries in whole vectors

  explicit Queries(const ModulationArgs& a)
      : args(a),
        k(a.depth, a.window_h * a.window_w),
        v(a.channels, a.window_h * a.window_w),
        q(a.depth, kTile),
        gate(a.channels, kTile),
        context(a.channels, kTile),
        weights(a.window_h * a.window_w * kTile),
        scratch((a.depth > a.channels ? a.depth : a.channels) * k.stride) {}

  // The weights of the tile's queries.
  void weigh(const Window& window, int64_t first, int64_t count) {
    const int64_t pixels = window.pixels;
    width = round_up(count, kLanes<C>);
    if (window.index != loaded) {
      loaded = window.index;
      k.template load_from<T>(window, args.k, 0, pixels, scratch);
      v.template load_from<T>(window, args.v, 0, pixels, scratch);
      if (!args.outside) v.apply([](vec<C> x) { return sigmoid<C>(x); });
    }
    q.template load_from<T>(window, args.q, first, count, scratch);
    gate.template load_from<T>(window, args.gate, first, count, scratch);
    multiply_pixels<C>(weights, kTile, nullptr, 0, pixels, k.transposed(), args.depth,
                       static_cast<const C*>(q.data), kTile, width);
    softmax_rows<C>(weights, static_cast<C>(args.scale), pixels, kTile, width);
  }
  // v P^T
  void mix(const Window& window) {
    multiply_pixels<C>(context.data, kTile, nullptr, 0, args.channels, v.matrix(), window.pixels,
                       static_cast<const C*>(weights), kTile, width);
  }
};

template <class T>
void forward(const ModulationArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  Queries<T> tile(args);
  const int64_t tiles = blocks_of(args.window_h * args.window_w, kTile);
  for (int64_t task = begin; task < end; ++task) {
    const Window window(args, task / tiles);
    const int64_t first = task % tiles * kTile, count = window.tile_at(first);
    tile.weigh(window, first, count);
    tile.mix(window);
    for (int64_t i = 0; i < args.channels * kTile; i += kLanes<C>) {
      const vec<C> context = load(tile.context.data + i);
      store(tile.context.data + i,
            (args.outside ? sigmoid<C>(context) : context) * sigmoid<C>(load(tile.gate.data + i)));
    }
    tile.context.template store_to<T>(window, args.y, first, count, tile.scratch);
  }
}

// The gradients of a window's keys and values, one below the other; v is as the attention took it.
template <class T, class C>
void store_keys(const ModulationArgs& args, const Window& window, Pixels<C>& grads, Pixels<C>& v,
                C* scratch) {
  const int64_t stride = grads.stride;
  C* grad_v = grads.data + args.depth * stride;
  for (int64_t i = 0; !args.outside && i < args.channels * stride; i += kLanes<C>) {
    const vec<C> s = load(v.data + i);
    store(grad_v + i, load(grad_v + i) * (s * (splat(C(1)) - s)));
  }
  const C *first = grads.data, *second = grad_v;
  window.store_pixels<T>(args.grad_k, args.depth, 0, window.pixels, first, stride, scratch);
  window.store_pixels<T>(args.grad_v, args.channels, 0, window.pixels, second, stride, scratch);
}

// With s = sigmoid(gate), c = v P^T and g the gradient of y:
//   dgate = g y (1 - s), dc = g s (with `outside` that is of sigmoid(c), whose derivative dc has, too),
//   dP = v^T dc, dS = P (dP - sum_keys P dP) scale, dq = k dS, dk = q dS^T, dv = dc P^T, and v's sigmoid.
template <class T>
void backward(const ModulationArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int64_t n = kLanes<C>;
  Queries<T> tile(args);
  const int64_t pixels = args.window_h * args.window_w;
  Pixels<C> y(args.channels, kTile), g(args.channels, kTile), grad_q(args.depth, kTile);
  Pixels<C> grad_keys(args.depth + args.channels, pixels);
  Buffer<C> grads(pixels * kTile);  // of the weights, then of the logits
  Buffer<C> columns(kTile * grad_keys.stride);
  // Adds left (rows, queries) right^T (queries, keys) to the sums of keys.
  auto add_keys = [&](int64_t row, int64_t rows, Matrix<C> left, const C* right, int64_t count) {
    const Tile<C> keys =
        load_tile<C>(FeatureMap<const C>{right, 0, 1, kTile}, 0, 0, count, 0, pixels, columns);
    C* sums = grad_keys.data + row * grad_keys.stride;
    multiply_pixels<C>(sums, grad_keys.stride, sums, grad_keys.stride, rows, left, count, keys.data,
                       keys.stride, keys.stride);
  };
  for (int64_t task = begin; task < end; ++task) {
    const Window window(args, task / args.groups);
    const int64_t start = task % args.groups * args.group, rest = pixels - start;
    grad_keys.clear();
    for (int64_t first = start; first < start + (rest < args.group ? rest : args.group); first += kTile) {
      const int64_t count = window.tile_at(first);
      tile.weigh(window, first, count);
      if (args.outside) tile.mix(window);
      g.template load_from<T>(window, args.grad_y, first, count, tile.scratch);
      y.template load_from<T>(window, args.y, first, count, tile.scratch);
      for (int64_t i = 0; i < args.channels * kTile; i += n) {
        const vec<C> grad = load(g.data + i), one = splat(C(1));
        const vec<C> s = sigmoid<C>(load(tile.gate.data + i));
        store(tile.gate.data + i, grad * load(y.data + i) * (one - s));
        vec<C> slope = s;
        if (args.outside) {
          const vec<C> out = sigmoid<C>(load(tile.context.data + i));
          slope *= out * (one - out);
        }
        store(g.data + i, grad * slope);
      }
      tile.gate.template store_to<T>(window, args.grad_gate, first, count, tile.scratch);
      multiply_pixels<C>(grads, kTile, nullptr, 0, pixels, tile.v.transposed(), args.channels,
                         static_cast<const C*>(g.data), kTile, tile.width);
      softmax_rows_backward<C>(tile.weights, grads, static_cast<C>(args.scale), pixels, kTile, tile.width);
      multiply_pixels<C>(grad_q.data, kTile, nullptr, 0, args.depth, tile.k.matrix(), pixels,
                         static_cast<const C*>(grads), kTile, tile.width);
      grad_q.template store_to<T>(window, args.grad_q, first, count, tile.scratch);
      add_keys(0, args.depth, tile.q.matrix(), grads, count);
      add_keys(args.depth, args.channels, g.matrix(), tile.weights, count);
    }
    if (args.groups == 1) {
      store_keys<T, C>(args, window, grad_keys, tile.v, tile.scratch);
    } else {
      const int64_t size = grad_keys.channels * grad_keys.stride;
      memcpy(static_cast<C*>(args.partial) + task * size, grad_keys.data, size * sizeof(C));
    }
  }
}

template <class T>
void backward_sum(const ModulationArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t pixels = args.window_h * args.window_w;
  Pixels<C> grads(args.depth + args.channels, pixels), v(args.channels, pixels);
  const int64_t size = grads.channels * grads.stride;
  Buffer<C> scratch(size);
  for (int64_t task = begin; task < end; ++task) {
    const Window window(args, task);
    v.template load_from<T>(window, args.v, 0, pixels, scratch);
    if (!args.outside) v.apply([](vec<C> x) { return sigmoid<C>(x); });
    const C* parts = static_cast<const C*>(args.partial) + task * args.groups * size;
    for (int64_t i = 0; i < size; i += kLanes<C>) {
      vec<C> sum = load(parts + i);
      for (int64_t k = 1; k < args.groups; ++k) sum += load(parts + k * size + i);
      store(grads.data + i, sum);
    }
    store_keys<T, C>(args, window, grads, v, scratch);
  }
}

}  // namespace

void modulation_attention_forward(const ModulationArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) { forward<decltype(element)>(args, begin, end); });
}

void modulation_attention_backward(const ModulationArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) { backward<decltype(element)>(args, begin, end); });
}

void modulation_attention_backward_sum(const ModulationArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) { backward_sum<decltype(element)>(args, begin, end); });
}

}  // namespace MFK_ISA
}  // namespace mfk
