#include "mobile_to_former_attention.h"

#include "../simd/elementary.h"
#include "../simd/tile.h"
#include "../simd/tile_gemm.h"
#include "head_task.h"

namespace mfk {
namespace MFK_ISA {
namespace {

// (B, heads, M, P) as a map whose channels are the tokens of the head.
template <class T>
FeatureMap<T> logits_of(void* data, const MobileToFormerArgs& args) {
  return {static_cast<T*>(data), args.heads * args.tokens * args.pixels, args.pixels, 1};
}

// scale * q x, tokens rows of `width` numbers. The product with the scale is rounded in a loop of its own:
// fused into the subtraction of the largest logit, it would make that one's weight differ from exp(0).
template <class C>
void multiply_logits(C* logits, const C* q, C scale, int64_t tokens, int64_t depth, const Tile<C>& x,
                     int64_t width) {
  multiply_pixels<C>(logits, width, nullptr, 0, tokens, Matrix<C>{q, depth, 1}, depth, x.data, x.stride,
                     width);
  for (int64_t i = 0; i < tokens * width; i += kLanes<C>) store(logits + i, load(logits + i) * scale);
}

// How many pixels of a tile take part: the mask hides the others.
enum class Seen { kNone, kSome, kAll };

// Where it is some, `seen` becomes 1 at these and 0 at the others.
template <class C>
Seen look(const MobileToFormerArgs& args, const HeadTask& task, int64_t p, int64_t count, int64_t width,
          C* seen) {
  if (args.mask == nullptr) return Seen::kAll;
  const uint8_t* mask = args.mask + task.b * args.pixels + p;
  int64_t hidden = 0;
  for (int64_t i = 0; i < count; ++i) hidden += mask[i] != 0;
  if (hidden == 0) return Seen::kAll;
  if (hidden == count) return Seen::kNone;
  for (int64_t i = 0; i < count; ++i) seen[i] = mask[i] == 0;
  for (int64_t i = count; i < width; ++i) seen[i] = 0;
  return Seen::kSome;
}

// Copies rows with `hidden` in the place of what is at the pixels that are not seen.
template <class C>
void hide(const Tile<C>& from, C* to, int64_t rows, int64_t width, const C* seen, C hidden) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; j += kLanes<C>) {
      store(to + i * width + j,
            load(seen + j) != vec<C>{} ? load(from.data + i * from.stride + j) : splat(hidden));
    }
  }
}
template <class C>
void hide(C* rows, int64_t count, int64_t width, const C* seen, C hidden) {
  hide<C>(Tile<C>{rows, width}, rows, count, width, seen, hidden);
}

// A tile of x, with zeros at the pixels that are not seen: a weight of zero would not hide a NaN.
template <class T>
Tile<compute_t<T>> load_seen(const MobileToFormerArgs& args, const HeadTask& task, int64_t p, int64_t count,
                             Seen how_many, const compute_t<T>* seen, compute_t<T>* scratch) {
  using C = compute_t<T>;
  const int64_t depth = args.channels / args.heads, width = round_up(count, kLanes<C>);
  const Tile<C> x = load_tile<T>(args.x.as<const T>(), task.b, task.head * depth, depth, p, count, scratch);
  if (how_many == Seen::kAll) return x;
  hide<C>(x, scratch, depth, width, seen, 0);
  return {scratch, width};
}

// Writes zeros into a tile of a map.
template <class T>
void store_zeros(const FeatureMap<T>& map, int64_t b, int64_t c, int64_t channels, int64_t p, int64_t count,
                 int64_t width, compute_t<T>* scratch) {
  for (int64_t i = 0; i < channels * width; ++i) scratch[i] = 0;
  store_tile<T>(map, b, c, channels, p, count, scratch, width);
}

template <class T>
void forward(const MobileToFormerArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int64_t n = kLanes<C>;
  const int64_t tokens = args.tokens, depth = args.channels / args.heads, record = 2 + depth;
  const C scale = static_cast<C>(args.scale);
  constexpr C minus_infinity = -C(__builtin_inf());
  Buffer<C> q(tokens * depth), scratch(depth * args.tile), logits(tokens * args.tile), seen(args.tile);
  for (int64_t index = begin; index < end; ++index) {
    const HeadTask task(args, index);
    load_head<T>(args.q, args, task, q);
    double* partial = args.partial + index * tokens * record;
    for (int64_t m = 0; m < tokens; ++m) {
      // Not minus infinity: a tile whose logits all are would give a NaN that later tiles cannot mend.
      partial[m * record] = sizeof(C) == 4 ? -__FLT_MAX__ : -__DBL_MAX__;
      for (int64_t i = 1; i < record; ++i) partial[m * record + i] = 0;
    }
    bool nothing = true;
    for_tiles<C>(task, args.tile, [&](int64_t p, int64_t count, int64_t width) {
      const Seen how_many = look<C>(args, task, p, count, width, seen);
      if (how_many == Seen::kNone) {
        if (args.logits != nullptr) {
          store_zeros<T>(logits_of<T>(args.logits, args), task.b, task.head * tokens, tokens, p, count, width,
                         logits);
        }
        return;
      }
      nothing = false;
      const Tile<C> x = load_seen<T>(args, task, p, count, how_many, seen, scratch);
      multiply_logits<C>(logits, q, scale, tokens, depth, x, width);
      if (args.logits != nullptr) {
        if (how_many == Seen::kSome) hide<C>(logits, tokens, width, seen, 0);
        store_tile<T>(logits_of<T>(args.logits, args), task.b, task.head * tokens, tokens, p, count, logits,
                      width);
      }
      if (how_many == Seen::kSome) hide<C>(logits, tokens, width, seen, minus_infinity);
      for (int64_t m = 0; m < tokens; ++m) {
        C* row = logits + m * width;
        double* state = partial + m * record;
        if (count < width) {  // pixels beyond the end weigh nothing
          const vec<C> last = load(row + width - n);
          store(row + width - n, first_lanes<C>(count - (width - n)) ? last : splat(minus_infinity));
        }
        vec<C> tops = load(row);
        for (int64_t j = n; j < width; j += n) {
          const vec<C> value = load(row + j);
          tops = value > tops ? value : tops;
        }
        const C before = static_cast<C>(state[0]), top = max_lanes<C>(tops);
        const C largest = top > before ? top : before, fade = exp_scalar<C>(before - largest);
        vec<C> sums{};
        for (int64_t j = 0; j < width; j += n) {
          const vec<C> weight = exp(load(row + j) - largest);
          store(row + j, weight);
          sums += weight;
        }
        state[0] = largest;
        state[1] = state[1] * fade + sum_lanes<C>(sums);
        if (fade != 1) {
          for (int64_t c = 0; c < depth; ++c) state[2 + c] *= fade;
        }
      }
      multiply_reduce<C>(partial + 2, record, 1, tokens, logits, width, depth, x.data, x.stride, width);
    });
    for (int64_t m = 0; nothing && m < tokens; ++m) partial[m * record] = -__builtin_inf();
  }
}

template <class T>
void combine(const MobileToFormerCombineArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t tokens = args.tokens, depth = args.channels / args.heads, record = 2 + depth;
  Buffer<double> total(depth);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / args.heads, head = index % args.heads;
    const double* parts = args.partial + index * args.splits * tokens * record;
    for (int64_t m = 0; m < tokens; ++m) {
      const double* first = parts + m * record;
      double top = first[0];
      for (int64_t s = 1; s < args.splits; ++s) {
        const double other = first[s * tokens * record];
        top = other > top ? other : top;
      }
      const bool nothing = top == -__builtin_inf();  // all of the sample's pixels are masked
      if (nothing) top = 0;
      double sum = 0;
      for (int64_t c = 0; c < depth; ++c) total[c] = 0;
      for (int64_t s = 0; s < args.splits; ++s) {
        const double* part = first + s * tokens * record;
        const double weight = args.splits == 1 ? 1 : exp_scalar<C>(static_cast<C>(part[0] - top));
        sum += weight * part[1];
        for (int64_t c = 0; c < depth; ++c) total[c] += weight * part[2 + c];
      }
      if (nothing) sum = 1;  // all sums are zero
      T* out = static_cast<T*>(args.out) + (b * tokens + m) * args.channels + head * depth;
      for (int64_t c = 0; c < depth; ++c) store_scalar(out + c, static_cast<C>(total[c] / sum));
      C* stats = static_cast<C*>(args.softmax_stats) + (index * tokens + m) * 2;
      stats[0] = static_cast<C>(top);
      stats[1] = static_cast<C>(sum);
    }
  }
}

// The backward pass: P = softmax(L), dP = dO X, dL = P * (dP - sum_p P dP) + grad_logits;
// dQ = scale * dL X^T, dX = scale * Q^T dL + dO^T P.
// It takes two steps, since the sum goes over all pixels. dO * O is the same sum on paper, and would need
// no such step; but where one pixel has nearly all the weight, dP and the sum cancel, and do so only when
// the sum is made of the very dP that it is subtracted from.
template <class T>
void backward_weights(const MobileToFormerArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int64_t n = kLanes<C>;
  const int64_t tokens = args.tokens, depth = args.channels / args.heads;
  const C scale = static_cast<C>(args.scale);
  Buffer<C> q(tokens * depth), grad_out(tokens * depth), scratch(depth * args.tile), seen(args.tile);
  for (int64_t index = begin; index < end; ++index) {
    const HeadTask task(args, index);
    load_head<T>(args.q, args, task, q);
    if (args.grad_out != nullptr) {
      load_head<T>(args.grad_out, args, task, grad_out);
    } else {
      for (int64_t i = 0; i < tokens * depth; ++i) grad_out[i] = 0;
    }
    const C* stats =
        static_cast<const C*>(args.softmax_stats) + (task.b * args.heads + task.head) * tokens * 2;
    C* of_task = static_cast<C*>(args.weights) + index * args.room;
    C* grads = static_cast<C*>(args.grad_weights) + index * args.room;
    double* products = args.products + index * tokens;
    for (int64_t m = 0; m < tokens; ++m) products[m] = 0;
    for_tiles<C>(task, args.tile, [&](int64_t p, int64_t count, int64_t width) {
      const Seen how_many = look<C>(args, task, p, count, width, seen);
      if (how_many == Seen::kNone) return;  // nobody reads their weights
      C *weights = of_task + (p - task.p0) * tokens, *grad_weights = grads + (p - task.p0) * tokens;
      const Tile<C> x = load_seen<T>(args, task, p, count, how_many, seen, scratch);
      multiply_logits<C>(weights, q, scale, tokens, depth, x, width);
      multiply_pixels<C>(grad_weights, width, nullptr, 0, tokens, Matrix<C>{grad_out, depth, 1}, depth,
                         x.data, x.stride, width);
      if (how_many == Seen::kSome) {
        hide<C>(weights, tokens, width, seen, -C(__builtin_inf()));
        hide<C>(grad_weights, tokens, width, seen, 0);
      }
      for (int64_t m = 0; m < tokens; ++m) {
        const C largest = stats[2 * m], norm = 1 / stats[2 * m + 1];
        WideSum<C> sum;
        for (int64_t j = 0; j < width; j += n) {
          C* at = weights + m * width + j;
          vec<C> weight = exp(load(at) - largest) * norm;
          if (count - j < n) weight = first_lanes<C>(count - j) ? weight : vec<C>{};  // beyond the end
          store(at, weight);
          sum.add(weight * load(grad_weights + m * width + j));
        }
        products[m] += sum_lanes<C>(sum);
      }
    });
  }
}

template <class T>
void backward(const MobileToFormerArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int64_t n = kLanes<C>;
  const int64_t tokens = args.tokens, depth = args.channels / args.heads;
  const C scale = static_cast<C>(args.scale);
  Buffer<C> q(tokens * depth), grad_out(tokens * depth), correction(tokens);
  Buffer<C> scratch(depth * args.tile), grad_x(depth * args.tile), grad_given(tokens * args.tile),
      seen(args.tile);
  for (int64_t index = begin; index < end; ++index) {
    const HeadTask task(args, index);
    load_head<T>(args.q, args, task, q);
    if (args.grad_out != nullptr) load_head<T>(args.grad_out, args, task, grad_out);
    const double* products = args.products + index / args.splits * args.splits * tokens;
    for (int64_t m = 0; m < tokens; ++m) {
      double sum = 0;
      for (int64_t s = 0; s < args.splits; ++s) sum += products[s * tokens + m];
      correction[m] = static_cast<C>(sum);
    }
    const C* of_task = static_cast<const C*>(args.weights) + index * args.room;
    C* grads = static_cast<C*>(args.grad_weights) + index * args.room;  // overwritten in place
    double* partial = args.partial + index * tokens * depth;
    for (int64_t i = 0; i < tokens * depth; ++i) partial[i] = 0;
    for_tiles<C>(task, args.tile, [&](int64_t p, int64_t count, int64_t width) {
      const Seen how_many = look<C>(args, task, p, count, width, seen);
      if (how_many == Seen::kNone) {
        store_zeros<T>(args.grad_x.as<T>(), task.b, task.head * depth, depth, p, count, width, grad_x);
        return;
      }
      const C* weights = of_task + (p - task.p0) * tokens;
      C* grad_logits = grads + (p - task.p0) * tokens;
      const Tile<C> x = load_seen<T>(args, task, p, count, how_many, seen, scratch);
      Tile<C> given{nullptr, 0};
      if (args.grad_logits != nullptr) {
        given = load_tile<T>(logits_of<const T>(const_cast<void*>(args.grad_logits), args), task.b,
                             task.head * tokens, tokens, p, count, grad_given);
      }
      for (int64_t m = 0; m < tokens; ++m) {
        for (int64_t j = 0; j < width; j += n) {
          C* grad = grad_logits + m * width + j;
          vec<C> g = load(weights + m * width + j) * (load(grad) - correction[m]);
          if (given.data != nullptr) g += load(given.data + m * given.stride + j);
          if (count - j < n) g = first_lanes<C>(count - j) ? g : vec<C>{};
          store(grad, g * scale);  // of q x, not of the logits
        }
      }
      if (how_many == Seen::kSome) hide<C>(grad_logits, tokens, width, seen, 0);
      multiply_pixels<C>(grad_x, width, nullptr, 0, depth, Matrix<C>{q, 1, depth}, tokens, grad_logits, width,
                         width);
      if (args.grad_out != nullptr) {
        multiply_pixels<C>(grad_x, width, grad_x, width, depth, Matrix<C>{grad_out, 1, depth}, tokens,
                           weights, width, width);
      }
      if (how_many == Seen::kSome) hide<C>(grad_x, depth, width, seen, 0);
      store_tile<T>(args.grad_x.as<T>(), task.b, task.head * depth, depth, p, count, grad_x, width);
      multiply_reduce<C>(partial, depth, 1, tokens, grad_logits, width, depth, x.data, x.stride, width);
    });
  }
}

}  // namespace

void mobile_to_former_forward(const MobileToFormerArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto zero) { forward<decltype(zero)>(args, begin, end); });
}

void mobile_to_former_combine(const MobileToFormerCombineArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto zero) { combine<decltype(zero)>(args, begin, end); });
}

void mobile_to_former_backward_weights(const MobileToFormerArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto zero) { backward_weights<decltype(zero)>(args, begin, end); });
}

void mobile_to_former_backward(const MobileToFormerArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto zero) { backward<decltype(zero)>(args, begin, end); });
}

}  // namespace MFK_ISA
}  // namespace mfk
