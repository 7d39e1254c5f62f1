#include "map_step.h"

namespace mfk {
namespace MFK_ISA {
namespace {

// Mobile-Former's blocks, whose maps are one each.
struct BlockSteps : MapTasks {
  using MapTasks::MapTasks;

  // Row y of the output of a depthwise convolution of the input, 3x3.
  template <class Out, class Epilogue>
  void depthwise_of_input(int64_t y, int64_t channels, int64_t hidden, int64_t stride, int64_t taps,
                          Stored* zeros, Out* out, Epilogue epilogue) const {
    if (stride == 1) {
      depthwise_of<3, 1>(y, channels, hidden, at(taps), zeros, out, epilogue);
    } else {
      depthwise_of<3, 2>(y, channels, hidden, at(taps), zeros, out, epilogue);
    }
  }
  // The same of rows that are kept.
  template <class Out, class Epilogue>
  void depthwise_of_ring(const Ring& ring, int64_t y, int64_t channels, int64_t hidden, int64_t taps,
                         Out* out, Epilogue epilogue) const {
    const float* rows[3] = {ring.at(y - 1), ring.at(y), ring.at(y + 1)};
    depthwise_row<3, 1>(rows, args.out.width, args.out.width, channels, at(taps), out, epilogue, hidden);
  }
  AddBiasRelu6 relu6(int64_t bias) const { return {at(bias)}; }
  AddBiasDynamicRelu dynamic_relu(int64_t bias, int64_t slopes, int64_t channels) const {
    return {at(bias), place(slopes), place(slopes) + channels};
  }
  // Calls f with each activation of a block, and what is done to rows that then lie in memory.
  template <class Step, class F>
  void with_slopes(const Step& step, int64_t bias1, int64_t hidden1, int64_t bias2, int64_t hidden2,
                   F f) const {
    if (kBytesAlone || step.attention < 0) {
      return f(dynamic_relu(bias1, step.slopes1, hidden1), Nothing{},
               dynamic_relu(bias2, step.slopes2, hidden2), Nothing{});
    }
    if constexpr (!kBytesAlone) {
      f(AddBias{at(bias1)}, mixed_slopes(kDynamicRelu, step.slopes1, step.tokens, hidden1),
        AddBias{at(bias2)}, mixed_slopes(kDynamicRelu, step.slopes2, step.tokens, hidden2));
    }
  }
  struct Nothing {
    template <class T>
    MFK_INLINE void apply(T*, int64_t, int64_t) const {}
  };
  // What a depthwise convolution of so many channels, and with padding, left: runs of the true channels.
  static Rows<Stored> expanded(const Stored* data, int64_t hidden, int64_t run, int64_t skip) {
    return {data, hidden, hidden / skip, run, skip};
  }
  // Of what `into` has written.
  template <class T>
  void project(Rows<Stored> rows, int64_t positions, const PlanLinear& linear, const T* added, Stored* out) {
    if (added == nullptr) {
      product_of_rounded(positions, rows, linear, out, out_channels, AddBias{at(linear.bias)});
    } else {
      product_of_rounded(positions, rows, linear, out, out_channels,
                         AddResidual<T>{at(linear.bias), added, out_channels});
    }
  }
  // Calls f(out, epilogue), which writes rows from the i-th number on, with room for them; they become the
  // inputs of a product: bytes where it wants them.
  template <class Epilogue, class F>
  static void into([[maybe_unused]] const PlanLinear& linear, Stored* hidden, int64_t i, Epilogue epilogue,
                   F f) {
#if MFK_INT8
    if (rounds(linear)) {
      return f(reinterpret_cast<uint8_t*>(hidden) + i, Rounded<Epilogue>{epilogue, Bytes(linear)});
    }
#endif
    if constexpr (!kBytesAlone) f(hidden + i, epilogue);
  }

  void lite(const LiteStep& step, int64_t begin, int64_t end) {
    const int64_t channels = padded(step.in_channels), hidden_row = args.out.width * step.hidden;
    const auto space = room<2>({args.in.width * channels, args.group * hidden_row});
    Stored *zeros = space.stored(0), *hidden = space.stored(1);
    memset(zeros, 0, args.in.width * channels * sizeof(Stored));
    for_tasks(begin, end, space.last(), [&](int64_t y0, int64_t y1) {
      for (int64_t y = y0; y < y1; ++y) {
        into(step.project, hidden, (y - y0) * hidden_row, relu6(step.taps + 9 * step.hidden),
             [&](auto* out, auto epilogue) {
               depthwise_of_input(y, channels, step.hidden, step.stride, step.taps, zeros, out, epilogue);
             });
      }
      project(expanded(hidden, step.hidden, step.in_channels, channels), (y1 - y0) * args.out.width,
              step.project, step.residual ? in_row(y0, channels) : nullptr, out_row(y0));
    });
  }

  void block(const BlockStep& step, int64_t begin, int64_t end) {
    const int64_t channels = padded(step.in_channels), row = args.in.width * step.hidden;
    const auto space = room<4>({row, (args.group + 2) * row, args.group * row,
                                bytes_room(step.expand, (args.group + 2) * args.in.width * channels)});
    memset(space.part[0], 0, row * sizeof(float));
    Ring ring{space.part[1], space.part[0], row, args.in.height};
    Stored* hidden = space.stored(2);
    const int64_t width = args.in.width;
    auto run = [&](auto first, auto first_rows, auto second, auto second_rows) {
      for_tasks(begin, end, space.last(), [&](int64_t y0, int64_t y1) {
        ring.provide(y0 - 1, y1 + 1, [&](float* to, int64_t from, int64_t until) {
          product((until - from) * width,
                  Rows<Stored>{in_row(from, channels), channels, 1, step.in_channels, 0}, step.expand,
                  space.part[3], to, step.hidden, first);
          first_rows.apply(to, from * width, (until - from) * width);
        });
        for (int64_t y = y0; y < y1; ++y) {
          into(step.project, hidden, (y - y0) * row, second, [&](auto* out, auto epilogue) {
            depthwise_of_ring(ring, y, step.hidden, step.hidden, step.taps, out, epilogue);
          });
        }
        second_rows.apply(hidden, y0 * width, (y1 - y0) * width);
        project(Rows<Stored>{hidden, step.hidden, 1, step.project.inputs, 0}, (y1 - y0) * width, step.project,
                step.residual ? in_row(y0, channels) : nullptr, out_row(y0));
      });
    };
    with_slopes(step, step.expand.bias, step.hidden, step.taps + 9 * step.hidden, step.hidden, run);
  }

  void down(const DownStep& step, int64_t begin, int64_t end) {
    const int64_t channels = padded(step.in_channels), width = args.out.width, row = width * out_channels;
    const int64_t row1 = width * step.hidden1, row2 = width * step.hidden2;
    const auto space = room<5>(
        {args.in.width * channels, row, (args.group + 2) * row1, (args.group + 2) * row, args.group * row2});
    memset(space.part[0], 0, args.in.width * channels * sizeof(Stored));
    memset(space.part[1], 0, row * sizeof(float));
    Stored *hidden1 = space.stored(2), *hidden2 = space.stored(4);
    Ring ring{space.part[3], space.part[1], row, args.out.height};
    auto run = [&](auto first, auto first_rows, auto second, auto second_rows) {
      for_tasks(begin, end, space.last(), [&](int64_t y0, int64_t y1) {
        ring.provide(y0 - 1, y1 + 1, [&](float* to, int64_t from, int64_t until) {
          for (int64_t y = from; y < until; ++y) {
            into(step.project1, hidden1, (y - from) * row1, first, [&](auto* out, auto epilogue) {
              depthwise_of_input(y, channels, step.hidden1, step.stride, step.taps1, space.stored(0), out,
                                 epilogue);
            });
          }
          first_rows.apply(hidden1, from * width, (until - from) * width);
          product_of_rounded((until - from) * width,
                             expanded(hidden1, step.hidden1, step.in_channels, channels), step.project1, to,
                             out_channels, AddBias{at(step.project1.bias)});
        });
        for (int64_t y = y0; y < y1; ++y) {
          into(step.project2, hidden2, (y - y0) * row2, second, [&](auto* out, auto epilogue) {
            depthwise_of_ring(ring, y, out_channels, step.hidden2, step.taps2, out, epilogue);
          });
        }
        second_rows.apply(hidden2, y0 * width, (y1 - y0) * width);
        project(expanded(hidden2, step.hidden2, made.channels, out_channels), (y1 - y0) * width,
                step.project2, ring.at(y0), out_row(y0));
      });
    };
    with_slopes(step, step.taps1 + 9 * step.hidden1, step.hidden1, step.taps2 + 9 * step.hidden2,
                step.hidden2, run);
  }
};

}  // namespace

void block_step(const StepArgs& args, int64_t begin, int64_t end) {
  BlockSteps blocks(args);
  switch (args.kind) {
    case kLite:
      return blocks.lite(fields_of<LiteStep>(args), begin, end);
    case kBlock:
      return blocks.block(fields_of<BlockStep>(args), begin, end);
    default:
      return blocks.down(fields_of<DownStep>(args), begin, end);
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
