#include "global_response_norm.h"

#include "../simd/tile.h"

namespace mfk {
namespace MFK_ISA {
namespace {

// The channels of a task. Lanes are pixels of one channel where these lie together, else channels of one
// pixel.
struct Run {
  int64_t b, c, channels;  // from channel c on

  template <class Args>
  Run(const Args& args, int64_t task) {
    const int64_t groups = blocks_of(args.channels, kResponseChannels);
    b = task / groups;
    c = task % groups * kResponseChannels;
    channels = args.channels - c < kResponseChannels ? args.channels - c : kResponseChannels;
  }
};

// So many squares are summed in the compute type before the sum goes into a double; they do not cancel.
template <class C>
constexpr int64_t kSteps = sizeof(C) == 4 ? 4 : 1;

template <class T, bool kBoth>
void sums(const ResponseSumsArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int64_t n = kLanes<C>, count = kBoth ? 3 : 1;
  double* out[3] = {args.squares, args.products, args.sums};
  const auto x = args.x.as<const T>(), g = args.g.as<const T>();
  for (int64_t task = begin; task < end; ++task) {
    const Run run(args, task);
    const int64_t at = run.b * args.channels + run.c;
    const bool rows = args.x.stride_p == 1;
    const int64_t steps = rows ? blocks_of(args.pixels, n) : args.pixels;
    for (int64_t c = 0; c < run.channels; c += rows ? 1 : n) {
      const T* first = x.at(run.b, run.c + c, 0);
      const T* grad = kBoth ? g.at(run.b, run.c + c, 0) : nullptr;
      const int64_t step = rows ? n : x.stride_p, grad_step = rows ? n : g.stride_p;
      auto lanes = [&](int64_t i) { return rows ? args.pixels - i * n : run.channels - c; };
      WideSum<C> total[count];
      for (int64_t i = 0; i < steps;) {
        if constexpr (kBoth) {
          const vec<C> value = load_upto(first + i * step, lanes(i));
          const vec<C> by = load_upto(grad + i * grad_step, lanes(i));
          total[0].add_product(value, value);
          total[1].add_product(value, by);
          total[2].add(by);
          ++i;
        } else {
          vec<C> squares{};
          const int64_t last = i + kSteps<C> < steps ? i + kSteps<C> : steps;
          for (; i < last; ++i) {
            const vec<C> value = load_upto(first + i * step, lanes(i));
            squares += value * value;
          }
          total[0].add(squares);
        }
      }
      for (int64_t k = 0; k < count; ++k) {
        if (rows) {
          out[k][at + c] = sum_lanes<C>(total[k]);
        } else {
          total[k].store_upto(out[k] + at + c, run.channels - c);
        }
      }
    }
  }
}

template <class T, bool kTwo>
void apply(const ResponseApplyArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  constexpr int64_t n = kLanes<C>;
  const auto a = args.a.as<const T>(), b = args.b.as<const T>();
  const auto out = args.out.as<T>();
  for (int64_t task = begin; task < end; ++task) {
    const Run run(args, task);
    C scale[kResponseChannels], other[kResponseChannels], shift[kResponseChannels];
    for (int64_t c = 0; c < kResponseChannels; ++c) {
      const int64_t at = run.b * args.channels + run.c + c;
      const bool inside = c < run.channels;
      scale[c] = inside ? static_cast<C>(args.scale[at]) : 0;
      other[c] = kTwo && inside ? static_cast<C>(args.other[at]) : 0;
      shift[c] = !kTwo && inside ? static_cast<C>(args.shift[run.c + c]) : 0;
    }
    const bool rows = args.a.stride_p == 1;
    const int64_t steps = rows ? blocks_of(args.pixels, n) : args.pixels;
    for (int64_t c = 0; c < run.channels; c += rows ? 1 : n) {
      const vec<C> by = rows ? splat(scale[c]) : load(scale + c);
      const vec<C> by_other = rows ? splat(other[c]) : load(other + c);
      const vec<C> plus = rows ? splat(shift[c]) : load(shift + c);
      const T* first = a.at(run.b, run.c + c, 0);
      const T* second = kTwo ? b.at(run.b, run.c + c, 0) : first;
      T* to = out.at(run.b, run.c + c, 0);
      for (int64_t i = 0; i < steps; ++i) {
        const int64_t lanes = rows ? args.pixels - i * n : run.channels - c;
        vec<C> value = load_upto(first + i * (rows ? n : a.stride_p), lanes) * by;
        if constexpr (kTwo) {
          value += load_upto(second + i * (rows ? n : b.stride_p), lanes) * by_other;
        } else {
          value += plus;
        }
        store_upto(to + i * (rows ? n : out.stride_p), value, lanes);
      }
    }
  }
}

}  // namespace

void response_sums(const ResponseSumsArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    args.both ? sums<T, true>(args, begin, end) : sums<T, false>(args, begin, end);
  });
}

void response_apply(const ResponseApplyArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    args.both ? apply<T, true>(args, begin, end) : apply<T, false>(args, begin, end);
  });
}

}  // namespace MFK_ISA
}  // namespace mfk
