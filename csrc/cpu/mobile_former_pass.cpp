#include "bridge.h"
#include "deployed_mobile_former.h"
#include "depthwise.h"
#include "gemm.h"
#include "map_rows.h"

namespace mfk {
namespace MFK_ISA {
namespace {

// One call of a pass: some of its tasks, one after the other.
struct Pass {
  const PassArgs& args;
  const PlanPass& plan;
  const float* weights;
  const int64_t in_channels, out_channels;  // padded
  Bridge bridge;
  float* next;  // free working memory

  explicit Pass(const PassArgs& a)
      : args(a),
        plan(*a.pass),
        weights(a.weights),
        in_channels(padded(plan.in_channels)),
        out_channels(padded(plan.out_channels)),
        bridge(plan.out_channels, out_channels, a.plan->heads, a.plan->tokens, plan.tokens.generate.outputs),
        next(a.scratch(room())) {}

  // Rows of the input that a task reads at most, were it all of them.
  int64_t rows(int64_t group) const { return group + 2; }
  // A line of the image with its padding; kernels may read to the end of a pair.
  int64_t line() const { return 2 * args.out_width + 2; }
  int64_t room() const {
    const int64_t group = args.group, out_row = args.out_width;
    const int64_t of_bridge = bridge.scratch(group * out_row);
    switch (plan.kind) {
      case kStem:
        return of_bridge + 3 * plan.in_channels * line() + 64;
      case kLite:
        return of_bridge + args.width * in_channels + group * out_row * plan.hidden1 + 64;
      case kBlock:
        return of_bridge + plan.hidden1 * (args.width * (rows(group) + 1) + group * out_row) + 64;
      default:
        return of_bridge + args.width * in_channels + rows(group) * out_row * plan.hidden1 +
               (rows(group) + 1) * out_row * out_channels + group * out_row * plan.hidden2 + 64;
    }
  }
  template <class T>
  T* take(int64_t count) {
    auto* p = reinterpret_cast<T*>(next);
    next += round_up(count, 16 * kStep<T>) / kStep<T>;
    return p;
  }
  template <class T>
  T* take_zeros(int64_t count) {
    T* p = take<T>(count);
    memset(p, 0, count * sizeof(T));
    return p;
  }

  const float* at(int64_t offset) const { return weights + offset; }
  Weights matrix(const PlanLinear& linear) const { return Weights{at(linear.weight), linear.outputs}; }
  Stored* out_row(int64_t y) const {
    return static_cast<Stored*>(args.out) + y * args.out_width * out_channels;
  }
  const Stored* in_row(int64_t y) const {
    return static_cast<const Stored*>(args.in) + y * args.width * in_channels;
  }

  // The bridges, over rows y0 to y1-1 of the output.
  void finish(int64_t task, int64_t y0, int64_t y1, float* scratch) {
    if (!plan.scatter && !plan.gather) return;
    const float* made = args.state.made;
    bridge.open(out_row(y0), (y1 - y0) * args.out_width, scratch);
    if (plan.scatter) {
      bridge.scatter(out_row(y0), made, made + out_channels);
      made += 2 * out_channels;
    }
    if (plan.gather) {
      bridge.gather(made, args.gathered + task * record_size(*args.plan, plan.out_channels));
    }
  }

  template <class F>
  void for_tasks(int64_t begin, int64_t end, F f) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t y0 = task * args.group;
      f(task, y0, y0 + args.group < args.out_height ? y0 + args.group : args.out_height);
    }
  }

  void stem(int64_t begin, int64_t end) {
    Stored* lines = take_zeros<Stored>(3 * plan.in_channels * line());  // (channels, 3, line)
    float* scratch = take<float>(bridge.scratch(args.group * args.out_width));
    for_tasks(begin, end, [&](int64_t task, int64_t y0, int64_t y1) {
      for (int64_t y = y0; y < y1; ++y) {
        for (int64_t c = 0; c < plan.in_channels; ++c) {
          for (int64_t ky = 0; ky < 3; ++ky) {
            image_line(*args.images, args.sample, c, 2 * y - 1 + ky, lines + (c * 3 + ky) * line() + 1);
          }
        }
        gemm(args.out_width, Rows<Stored>{lines, 2, 3 * plan.in_channels, 3, line()}, matrix(plan.pointwise1),
             out_row(y), out_channels, AddBiasRelu6{at(plan.pointwise1.bias)});
      }
      finish(task, y0, y1, scratch);
    });
  }

  // One row of a depthwise convolution with padding 1 and the pass's stride. `row(y)` is a pointer to an
  // input row, or to zeros.
  template <class In, class Epilogue>
  void depthwise(const In* const (&rows)[3], int64_t width, int64_t out_width, int64_t channels,
                 int64_t hidden, int64_t stride, int64_t taps, Stored* out, Epilogue epilogue) const {
    if (stride == 1) {
      depthwise_row<3, 1>(rows, width, out_width, channels, at(taps), out, epilogue, hidden);
    } else {
      depthwise_row<3, 2>(rows, width, out_width, channels, at(taps), out, epilogue, hidden);
    }
  }
  AddBiasDynamicRelu activation(int64_t bias, const float* slopes, int64_t channels) const {
    return {at(bias), slopes, slopes + channels};
  }
  // What the depthwise convolution before it left, multiple runs of the true channels.
  Rows<Stored> expanded(const Stored* data, int64_t hidden, int64_t run, int64_t skip) const {
    return {data, hidden, hidden / skip, run, skip};
  }

  // pointwise2 over `positions`, with what is added to it.
  template <class T>
  void project(Rows<Stored> rows, int64_t positions, const T* added, Stored* out) const {
    if (added == nullptr) {
      gemm(positions, rows, matrix(plan.pointwise2), out, out_channels, AddBias{at(plan.pointwise2.bias)});
    } else {
      gemm(positions, rows, matrix(plan.pointwise2), out, out_channels,
           AddResidual<T>{at(plan.pointwise2.bias), added, out_channels});
    }
  }

  void lite(int64_t begin, int64_t end) {
    const Stored* zeros = take_zeros<Stored>(args.width * in_channels);
    Stored* hidden = take<Stored>(args.group * args.out_width * plan.hidden1);
    float* scratch = take<float>(bridge.scratch(args.group * args.out_width));
    const AddBiasRelu6 relu6{at(plan.depthwise1 + 9 * plan.hidden1)};
    for_tasks(begin, end, [&](int64_t task, int64_t y0, int64_t y1) {
      for (int64_t y = y0; y < y1; ++y) {
        const Stored* rows[3];
        for (int64_t ky = 0; ky < 3; ++ky) rows[ky] = input_or(zeros, y * plan.stride - 1 + ky);
        depthwise(rows, args.width, args.out_width, in_channels, plan.hidden1, plan.stride, plan.depthwise1,
                  hidden + (y - y0) * args.out_width * plan.hidden1, relu6);
      }
      project(expanded(hidden, plan.hidden1, plan.in_channels, in_channels), (y1 - y0) * args.out_width,
              plan.residual ? in_row(y0) : nullptr, out_row(y0));
      finish(task, y0, y1, scratch);
    });
  }
  const Stored* input_or(const Stored* zeros, int64_t y) const {
    return y < 0 || y >= args.height ? zeros : in_row(y);
  }

  void block(int64_t begin, int64_t end) {
    const int64_t row = args.width * plan.hidden1;
    const float* zeros = take_zeros<float>(row);
    Ring ring{take<float>(rows(args.group) * row), zeros, row, args.height};
    Stored* hidden = take<Stored>(args.group * args.out_width * plan.hidden1);
    float* scratch = take<float>(bridge.scratch(args.group * args.out_width));
    const auto act1 = activation(plan.pointwise1.bias, args.state.slopes1, plan.hidden1);
    const auto act2 = activation(plan.depthwise1 + 9 * plan.hidden1, args.state.slopes2, plan.hidden1);
    for_tasks(begin, end, [&](int64_t task, int64_t y0, int64_t y1) {
      ring.provide(y0 - 1, y1 + 1, [&](float* to, int64_t from, int64_t until) {
        gemm((until - from) * args.width, Rows<Stored>{in_row(from), in_channels, 1, plan.in_channels, 0},
             matrix(plan.pointwise1), to, plan.hidden1, act1);
      });
      for (int64_t y = y0; y < y1; ++y) {
        const float* rows[3] = {ring.at(y - 1), ring.at(y), ring.at(y + 1)};
        depthwise(rows, args.width, args.out_width, plan.hidden1, plan.hidden1, 1, plan.depthwise1,
                  hidden + (y - y0) * row, act2);
      }
      project(Rows<Stored>{hidden, plan.hidden1, 1, plan.pointwise2.inputs, 0}, (y1 - y0) * args.width,
              plan.residual ? in_row(y0) : nullptr, out_row(y0));
      finish(task, y0, y1, scratch);
    });
  }

  void down(int64_t begin, int64_t end) {
    const int64_t row = args.out_width * out_channels;
    const Stored* input_zeros = take_zeros<Stored>(args.width * in_channels);
    const float* zeros = take_zeros<float>(row);
    Stored* hidden1 = take<Stored>(rows(args.group) * args.out_width * plan.hidden1);
    Ring ring{take<float>(rows(args.group) * row), zeros, row, args.out_height};
    Stored* hidden2 = take<Stored>(args.group * args.out_width * plan.hidden2);
    float* scratch = take<float>(bridge.scratch(args.group * args.out_width));
    const auto act1 = activation(plan.depthwise1 + 9 * plan.hidden1, args.state.slopes1, plan.hidden1);
    const auto act2 = activation(plan.depthwise2 + 9 * plan.hidden2, args.state.slopes2, plan.hidden2);
    for_tasks(begin, end, [&](int64_t task, int64_t y0, int64_t y1) {
      ring.provide(y0 - 1, y1 + 1, [&](float* to, int64_t from, int64_t until) {
        for (int64_t y = from; y < until; ++y) {
          const Stored* rows[3];
          for (int64_t ky = 0; ky < 3; ++ky) rows[ky] = input_or(input_zeros, y * plan.stride - 1 + ky);
          depthwise(rows, args.width, args.out_width, in_channels, plan.hidden1, plan.stride, plan.depthwise1,
                    hidden1 + (y - from) * args.out_width * plan.hidden1, act1);
        }
        gemm((until - from) * args.out_width, expanded(hidden1, plan.hidden1, plan.in_channels, in_channels),
             matrix(plan.pointwise1), to, out_channels, AddBias{at(plan.pointwise1.bias)});
      });
      for (int64_t y = y0; y < y1; ++y) {
        const float* rows[3] = {ring.at(y - 1), ring.at(y), ring.at(y + 1)};
        depthwise(rows, args.out_width, args.out_width, out_channels, plan.hidden2, 1, plan.depthwise2,
                  hidden2 + (y - y0) * args.out_width * plan.hidden2, act2);
      }
      project(expanded(hidden2, plan.hidden2, plan.out_channels, out_channels), (y1 - y0) * args.out_width,
              ring.at(y0), out_row(y0));
      finish(task, y0, y1, scratch);
    });
  }
};

}  // namespace

void mobile_former_pass(const PassArgs& args, int64_t begin, int64_t end) {
  Pass pass(args);
  switch (args.pass->kind) {
    case kStem:
      pass.stem(begin, end);
      break;
    case kLite:
      pass.lite(begin, end);
      break;
    case kBlock:
      pass.block(begin, end);
      break;
    default:
      pass.down(begin, end);
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
