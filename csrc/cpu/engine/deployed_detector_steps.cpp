#include "map_step.h"

namespace mfk {
namespace MFK_ISA {
namespace {

// What heads of detectors have beside the steps of their backbones.
struct DetectorSteps : MapTasks {
  using MapTasks::MapTasks;

  // Where an axis of the result reads the input: `first` and `second`, and the share of the second.
  struct Taps {
    int64_t first, second;
    float share;
  };
  // As PyTorch has it, in float.
  static Taps taps(const ResizeStep& step, int64_t inputs, int64_t outputs, int64_t i) {
    if (step.like == kHalfTheSize) return {2 * i, 2 * i, 0.0f};
    const float scale =
        step.resampling == kBilinearByTwo ? 0.5f : static_cast<float>(inputs) / static_cast<float>(outputs);
    float at = static_cast<float>(i) * scale;
    if (step.resampling != kNearest) at = (static_cast<float>(i) + 0.5f) * scale - 0.5f;
    at = at > 0 ? at : 0.0f;
    int64_t first = static_cast<int64_t>(at);
    first = first < inputs ? first : inputs - 1;
    if (step.resampling == kNearest) return {first, first, 0.0f};
    const float share = at - static_cast<float>(first);
    return {first, first + 1 < inputs ? first + 1 : first, share < 1 ? share : 1.0f};
  }

  void resize(const ResizeStep& step, int64_t begin, int64_t end) {
    constexpr int64_t n = kLanes<float>;
    const int64_t pixel = out_channels, width = args.out.width, row = args.in.width * pixel;
    const auto* in = static_cast<const Stored*>(args.in.data);
    const bool same = args.in.height == args.out.height && args.in.width == width;
    const bool exact =
        step.resampling == kNearest || step.like == kHalfTheSize || (same && step.resampling == kBilinear);
    const auto space = room<1>({0});
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      for (int64_t r = r0; r < r1; ++r) {
        const Taps y = taps(step, args.in.height, args.out.height, r);
        const Stored *top = in + y.first * row, *bottom = in + y.second * row;
        const auto* added = static_cast<const Stored*>(args.added.data) + r * width * pixel;
        Stored* to = out_row(r);
        for (int64_t i = 0; i < width; ++i, added += pixel, to += pixel) {
          const Taps x = taps(step, args.in.width, width, i);
          const int64_t left = x.first * pixel, right = x.second * pixel;
          for (int64_t c = 0; c < pixel; c += n) {
            vec<float> value;
            if (exact) {
              value = load(top + left + c);
            } else {
              const vec<float> above = blended(load(top + left + c), load(top + right + c), x.share);
              const vec<float> below = blended(load(bottom + left + c), load(bottom + right + c), x.share);
              value = blended(above, below, y.share);
            }
            store(to + c, step.added >= 0 ? value + load(added + c) : value);
          }
        }
      }
    });
  }
  static MFK_INLINE vec<float> blended(vec<float> a, vec<float> b, float share) {
    return (1.0f - share) * a + share * b;
  }

  void state_rows(const StateRowsStep& step, int64_t begin, int64_t end) {
    const auto space = room<1>({0});
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      for (int64_t r = r0; r < r1; ++r) {
        const float* from = place(step.source) + r * step.stride;
        for (int64_t c = 0; c < out_channels; c += kLanes<float>) store(out_row(r) + c, load(from + c));
      }
    });
  }

  void dynamic_lite(const DynamicLiteStep& step, int64_t begin, int64_t end) {
    const int64_t channels = padded(step.in_channels), hidden_row = args.out.width * step.hidden;
    const auto space = room<2>({args.in.width * channels, args.group * hidden_row});
    Stored *zeros = space.stored(0), *hidden = space.stored(1);
    memset(zeros, 0, args.in.width * channels * sizeof(Stored));
    const float* bias = at(step.taps + 9 * step.hidden);
    const AddBiasDynamicRelu activation{bias, place(step.slopes), place(step.slopes) + step.hidden};
    const Rows<Stored> rows{hidden, step.hidden, step.hidden / channels, step.in_channels, channels};
    for_tasks(begin, end, space.last(), [&](int64_t y0, int64_t y1) {
      for (int64_t y = y0; y < y1; ++y) {
        depthwise_of<3, 1>(y, channels, step.hidden, at(step.taps), zeros, hidden + (y - y0) * hidden_row,
                           activation);
      }
      gemm((y1 - y0) * args.out.width, rows, matrix(step.project), out_row(y0), out_channels,
           AddResidual<Stored>{at(step.project.bias), in_row(y0, channels), out_channels});
    });
  }
};

}  // namespace

void detector_step(const StepArgs& args, int64_t begin, int64_t end) {
  DetectorSteps steps(args);
  switch (args.kind) {
    case kResize:
      return steps.resize(fields_of<ResizeStep>(args), begin, end);
    case kStateRows:
      return steps.state_rows(fields_of<StateRowsStep>(args), begin, end);
    default:
      return steps.dynamic_lite(fields_of<DynamicLiteStep>(args), begin, end);
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
