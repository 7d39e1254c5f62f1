#include "former_to_mobile_attention.h"

#include "../simd/softmax.h"
#include "../simd/tile.h"
#include "../simd/tile_gemm.h"
#include "head_task.h"

namespace mfk {
namespace MFK_ISA {
namespace {

template <class T>
void forward(const FormerToMobileArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t tokens = args.tokens, depth = args.channels / args.heads;
  const C scale = static_cast<C>(args.scale);
  Buffer<C> k(tokens * depth), v(tokens * depth);
  Buffer<C> scratch(depth * args.tile), weights(tokens * args.tile), y(depth * args.tile);
  int64_t loaded = -1;
  for (int64_t index = begin; index < end; ++index) {
    const HeadTask task(args, index);
    if (index / args.splits != loaded) {
      load_head<T>(args.k, args, task, k);
      load_head<T>(args.v, args, task, v);
      loaded = index / args.splits;
    }
    for_tiles<C>(task, args.tile, [&](int64_t p, int64_t count, int64_t width) {
      const Tile<C> x =
          load_tile<T>(args.x.as<const T>(), task.b, task.head * depth, depth, p, count, scratch);
      multiply_pixels<C>(weights, width, nullptr, 0, tokens, Matrix<C>{k, depth, 1}, depth, x.data, x.stride,
                         width);
      softmax_rows<C>(weights, scale, tokens, width, width);
      multiply_pixels<C>(y, width, x.data, x.stride, depth, Matrix<C>{v, 1, depth}, tokens, weights, width,
                         width);
      store_tile<T>(args.y.as<T>(), task.b, task.head * depth, depth, p, count, y, width);
    });
  }
}

// With g the gradient of y: dV = P^T g, dP = g V, dS = P * (dP - sum_m P dP),
// dX = g + K^T (scale dS), dK = (scale dS) X^T.
template <class T>
void backward(const FormerToMobileArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t tokens = args.tokens, depth = args.channels / args.heads;
  const C scale = static_cast<C>(args.scale);
  Buffer<C> k(tokens * depth), v(tokens * depth);
  Buffer<C> scratch(depth * args.tile), grad_scratch(depth * args.tile), grad_x(depth * args.tile),
      weights(tokens * args.tile), grad_logits(tokens * args.tile);
  for (int64_t index = begin; index < end; ++index) {
    const HeadTask task(args, index);
    load_head<T>(args.k, args, task, k);
    load_head<T>(args.v, args, task, v);
    double* partial_k = args.partial_k + index * tokens * depth;
    double* partial_v = args.partial_v + index * tokens * depth;
    for (int64_t i = 0; i < tokens * depth; ++i) partial_k[i] = partial_v[i] = 0;
    for_tiles<C>(task, args.tile, [&](int64_t p, int64_t count, int64_t width) {
      const int64_t c = task.head * depth;
      const Tile<C> x = load_tile<T>(args.x.as<const T>(), task.b, c, depth, p, count, scratch);
      const Tile<C> g = load_tile<T>(args.grad_y.as<const T>(), task.b, c, depth, p, count, grad_scratch);
      multiply_pixels<C>(weights, width, nullptr, 0, tokens, Matrix<C>{k, depth, 1}, depth, x.data, x.stride,
                         width);
      softmax_rows<C>(weights, scale, tokens, width, width);
      multiply_pixels<C>(grad_logits, width, nullptr, 0, tokens, Matrix<C>{v, depth, 1}, depth, g.data,
                         g.stride, width);
      softmax_rows_backward<C>(weights, grad_logits, scale, tokens, width, width);  // of x k
      multiply_pixels<C>(grad_x, width, g.data, g.stride, depth, Matrix<C>{k, 1, depth}, tokens, grad_logits,
                         width, width);
      store_tile<T>(args.grad_x.as<T>(), task.b, c, depth, p, count, grad_x, width);
      multiply_reduce<C>(partial_k, depth, 1, tokens, grad_logits, width, depth, x.data, x.stride, width);
      multiply_reduce<C>(partial_v, depth, 1, tokens, weights, width, depth, g.data, g.stride, width);
    });
  }
}

}  // namespace

void former_to_mobile_forward(const FormerToMobileArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto zero) { forward<decltype(zero)>(args, begin, end); });
}

void former_to_mobile_backward(const FormerToMobileArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto zero) { backward<decltype(zero)>(args, begin, end); });
}

}  // namespace MFK_ISA
}  // namespace mfk
