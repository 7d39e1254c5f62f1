// What the two cross attentions share: one task is a head of a sample, and some of its pixels.
#pragma once

#include "../simd/vec.h"

namespace mfk {
namespace MFK_ISA {

struct HeadTask {
  int64_t b, head, p0, p1;

  template <class Args>
  HeadTask(const Args& args, int64_t task)
      : b(task / args.splits / args.heads),
        head(task / args.splits % args.heads),
        p0(task % args.splits * args.split),
        p1(p0 + args.split < args.pixels ? p0 + args.split : args.pixels) {}
};

// Calls f(p, count, width) for each tile of the task's pixels: from pixel p on, `count` of them, in `width`
// numbers, whole vectors.
template <class C, class F>
MFK_INLINE void for_tiles(const HeadTask& task, int64_t tile, F f) {
  for (int64_t p = task.p0; p < task.p1; p += tile) {
    const int64_t count = task.p1 - p < tile ? task.p1 - p : tile;
    f(p, count, round_up(count, kLanes<C>));
  }
}

// The head's slice of (B, M, C), as (M, C/heads) in the compute type.
template <class T, class Args>
void load_head(const void* source, const Args& args, const HeadTask& task, compute_t<T>* out) {
  const int64_t depth = args.channels / args.heads;
  for (int64_t m = 0; m < args.tokens; ++m) {
    const T* row =
        static_cast<const T*>(source) + (task.b * args.tokens + m) * args.channels + task.head * depth;
    for (int64_t c = 0; c < depth; ++c) out[m * depth + c] = to_compute(row[c]);
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
