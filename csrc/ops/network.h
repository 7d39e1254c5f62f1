// How a deployed network runs, from its plan. No PyTorch in here, see run_network.h.
#pragma once

#include <algorithm>
#include <vector>

#include "plan_check.h"
#include "run_network.h"

namespace mfk {
namespace {

class Network {
 public:
  // Of a plan that PlanCheck has looked at; throws where its steps want maps of other shapes than they find.
  Network(const int64_t* words, const float* weights, const Images& images)
      : plan_(*reinterpret_cast<const Plan*>(words)), weights_(weights), images_(images) {
    Shape maps[kMostMaps] = {};
    const PlanStep* at = first_step(plan_);
    steps_.reserve(plan_.steps);
    for (int64_t i = 0; i < plan_.steps; ++i, at = next_step(at)) {
      steps_.push_back({at});
      Step& step = steps_.back();
      if (at->kind < kFirstOfState) {
        shape(step, maps, i);
      } else if (at->kind == kMix) {
        step.tasks = blocks_of(fields_of<MixStep>(at).blocks, kMixTask);
      } else if (at->kind == kPooled) {
        step.in = maps[fields_of<PooledStep>(at).input];
        step.tasks = blocks_of(fields_of<PooledStep>(at).linear.outputs, kOutputsTask);
      } else if (at->kind == kCollect) {
        const auto& collect = fields_of<CollectStep>(at);
        step.in = maps[collect.input];
        need_of_positions(step.in, collect.positions, i, at->kind);
        step.tasks = blocks_of(padded(collect.in_channels), kOutputsTask);
      } else if (at->kind == kHandOut) {
        const auto& handed = fields_of<HandOutStep>(at);
        const Shape& map = maps[handed.map];
        need_of_step(map.whole_height == 0, i, at->kind, "hands out a map in windows");
        handed_out_.push_back({handed.channels, map.height, map.width, {}});
      }
    }
    share_weights();
    for (int64_t m = 0; m < plan_.maps; ++m) memory_ += padded(sizes_[m]);
    memory_ += padded(2 * records_) + padded(plan_.state);
  }

  bool bf16() const { return plan_.bf16; }
  int64_t narrow() const { return plan_.narrow; }
  // From now on calls find what this one wants, or null; on one thread.
  void calibrate(const Calibration* calibration) { calibration_ = calibration; }
  const float* weights() const { return weights_; }
  int64_t linears() const { return plan_.linears; }
  const PlanLayer& linear(int64_t i) const { return layers_of(plan_)[i]; }
  // The maps that are results, in their order; `to` is the caller's to fill in.
  std::vector<HandedOut>& handed_out() { return handed_out_; }
  // Floats of memory for a sample.
  int64_t memory() const { return memory_; }

  // See run_network; `done()` is called after each step.
  template <class Run, class Done>
  void features(int64_t sample, float* memory, float* out, Run run, Done done) const {
    void* maps[kMostMaps];
    float* p = memory;
    for (int64_t m = 0; m < plan_.maps; ++m) {
      maps[m] = p;
      p += padded(sizes_[m]);
    }
    StepArgs args{};
    args.plan = &plan_;
    args.weights = weights_;
    args.state = p;
    args.records = reinterpret_cast<double*>(p + padded(plan_.state));
    args.images = &images_;
    args.sample = sample;
    args.calibration = calibration_;
    const HandedOut* next = handed_out_.data();
    for (const Step& step : steps_) {
      const int64_t kind = args.kind = step.plan->kind;
      args.fields = reinterpret_cast<const int64_t*>(step.plan + 1);
      if (kind < kFirstOfState) {
        const auto& made = fields_of<MapOut>(step.plan);
        const int64_t in = input(step.plan);
        if (in >= 0) args.in = map(step.in, maps[in]);
        if (added(step.plan) >= 0) args.added = map(step.out, maps[added(step.plan)]);
        if (attention(step.plan) >= 0) args.attention = map(step.out, maps[attention(step.plan)]);
        args.out = map(step.out, maps[made.map]);
        args.group = step.group;
        args.next = step.next;
        args.next_end = step.next_end;
        args.products = step.products;
        args.bytes = rounds(step.plan);
        if (kind == kLite || kind == kBlock || kind == kDown) {
          run(step.tasks, [&](int64_t begin, int64_t end) { block_step(args, begin, end); });
        } else if (kind == kResize || kind == kStateRows || kind == kDynamicLite) {
          run(step.tasks, [&](int64_t begin, int64_t end) { detector_step(args, begin, end); });
        } else {
          run(step.tasks, [&](int64_t begin, int64_t end) { map_step(args, begin, end); });
        }
        args.last = &made;
        args.tasks = step.tasks;
        args.pixels = step.out.count * step.out.height * step.out.width;
      } else if (kind == kHandOut) {
        next++->write(bf16(), maps[fields_of<HandOutStep>(step.plan).map], sample, run);
      } else {
        if (kind == kPooled) args.in = map(step.in, maps[fields_of<PooledStep>(step.plan).input]);
        if (kind == kCollect) args.in = map(step.in, maps[fields_of<CollectStep>(step.plan).input]);
        run(step.tasks, [&](int64_t begin, int64_t end) { state_step(args, begin, end); });
      }
      done();
    }
    if (plan_.linears > 0) std::copy_n(args.state + plan_.features, padded(linear(0).linear.inputs), out);
  }

 private:
  // Of a map: so many windows, and what they were cut from, or one map.
  struct Shape {
    int64_t count, height, width;
    int64_t whole_height = 0, whole_width = 0;  // 0 where it is one map
    int64_t outer_height = 0, outer_width = 0;  // what the whole was cut from; 0 where that is one map

    bool operator==(const Shape& other) const {
      return count == other.count && height == other.height && width == other.width;
    }
  };
  struct Step {
    const PlanStep* plan;
    Shape in{}, out{};
    int64_t group = 1, tasks = 1;
    int64_t next = 0, next_end = 0, products = 0;  // see StepArgs
  };

  static StepMap map(const Shape& shape, void* data) {
    return {data, shape.count, shape.height, shape.width};
  }
  // The number of the map that a step reads; -1 for the image. It follows the map that it writes.
  static int64_t input(const PlanStep* step) {
    return reinterpret_cast<const int64_t*>(&fields_of<MapOut>(step) + 1)[0];
  }

  // The number of the map that a step adds to it; -1 for none.
  static int64_t added(const PlanStep* step) {
    if (step->kind == kAdd) return fields_of<AddStep>(step).added;
    if (step->kind == kResize) return fields_of<ResizeStep>(step).added;
    return step->kind == kPointwise ? fields_of<PointwiseStep>(step).added : -1;
  }

  // The number of the map of the tokens' weights that a step mixes slopes by; -1 for none.
  static int64_t attention(const PlanStep* step) {
    switch (step->kind) {
      case kPointwise:
        return fields_of<PointwiseStep>(step).attention;
      case kDepthwise:
        return fields_of<DepthwiseStep>(step).attention;
      case kBlock:
        return fields_of<BlockStep>(step).attention;
      case kDown:
        return fields_of<DownStep>(step).attention;
      default:
        return -1;
    }
  }

  // Whether a step's matrices are int8: all are, or none.
  static bool rounds(const PlanStep* step) {
    switch (step->kind) {
      case kDenseConv:
        return fields_of<ConvStep>(step).linear.scale != 0;
      case kPointwise:
        return fields_of<PointwiseStep>(step).linear.scale != 0;
      case kInverted:
        return fields_of<InvertedStep>(step).expand.scale != 0;
      case kLite:
        return fields_of<LiteStep>(step).project.scale != 0;
      case kBlock:
        return fields_of<BlockStep>(step).expand.scale != 0;
      case kDown:
        return fields_of<DownStep>(step).project1.scale != 0;
      default:
        return false;
    }
  }

  // Multiply-adds of a step for a position of its map, those that read weights in panels.
  static int64_t products(const PlanStep* step) {
    auto of = [](const PlanLinear& linear) { return linear.inputs * linear.outputs; };
    switch (step->kind) {
      case kImageConv:
      case kDenseConv:
        return of(fields_of<ConvStep>(step).linear) / fields_of<ConvStep>(step).groups;
      case kPointwise:
        return of(fields_of<PointwiseStep>(step).linear) / fields_of<PointwiseStep>(step).groups;
      case kInverted:
        return of(fields_of<InvertedStep>(step).expand) + of(fields_of<InvertedStep>(step).project);
      case kLite:
        return of(fields_of<LiteStep>(step).project);
      case kBlock:
        return of(fields_of<BlockStep>(step).expand) + of(fields_of<BlockStep>(step).project);
      case kDown:
        return of(fields_of<DownStep>(step).project1) + of(fields_of<DownStep>(step).project2);
      case kDynamicLite:
        return of(fields_of<DynamicLiteStep>(step).project);
      default:
        return 0;
    }
  }
  // Each step with products fetches the weights of the steps up to the next such one.
  void share_weights() {
    int64_t end = plan_.weights;
    for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
      if (step->products == 0) continue;
      step->next = std::min(step->plan->behind, end);
      step->next_end = end;
      end = step->next;
    }
  }

  static constexpr int64_t kMostSide = 1 << 16;
  Shape resized(const ResizeStep& step, const Shape& from, const Shape* maps) const {
    switch (step.like) {
      case kSizeOfImage:
        return {1, images_.height, images_.width, 0, 0};
      case kTwiceTheSize:
        return {1, 2 * from.height, 2 * from.width, 0, 0};
      case kHalfTheSize:
        return {1, blocks_of(from.height, 2), blocks_of(from.width, 2), 0, 0};
      default:
        return maps[step.like];
    }
  }

  // Of step i, which has weights for the positions of a map.
  static void need_of_positions(const Shape& shape, int64_t positions, int64_t i, int64_t kind) {
    need_of_step(shape.whole_height == 0, i, kind, "reads a map in windows");
    const int64_t height = shape.height, width = shape.width;
    need_of_image(height * width == positions, i, kind,
                  "mixes the positions of maps of " + std::to_string(positions) + " pixels, not of " +
                      std::to_string(height) + "x" + std::to_string(width));
  }

  // What step i makes of the maps, and in how many tasks.
  void shape(Step& step, Shape* maps, int64_t i) {
    const PlanStep* plan = step.plan;
    const int64_t kind = plan->kind, in = input(plan);
    auto need = [&](bool fits, const char* what) { need_of_step(fits, i, kind, what); };
    const auto& made = fields_of<MapOut>(plan);
    auto shrink = [&](Shape& map, const auto& window) {
      map.height = size_after(window, map.height);
      map.width = size_after(window, map.width);
      need_of_image(map.height >= 1 && map.width >= 1, i, kind, "would make an empty map");
    };
    const Shape from = in < 0 ? Shape{1, images_.height, images_.width} : maps[in];
    Shape to = from;
    int64_t floats = padded(made.channels), most = kSecondCache, stride = 1;  // of a position's memory
    switch (kind) {
      case kImageConv:
      case kDenseConv: {
        const auto& conv = fields_of<ConvStep>(plan);
        shrink(to, conv);
        if (kind == kDenseConv) floats = padded(conv.in_channels * conv.kernel * conv.kernel);
        most = 98304;
        if (kind == kDenseConv && is_direct(conv, from.count) && conv.linear.scale == 0) {
          floats = conv.in_channels * conv.stride;
          most = 65536;
        }
        break;
      }
      case kDepthwise:
        shrink(to, fields_of<DepthwiseStep>(plan));
        break;
      case kMaxPool:
        shrink(to, fields_of<MaxPoolStep>(plan));
        break;
      case kWeigh:
        need(from.whole_height == 0, "reads a map in windows");
        stride = fields_of<WeighStep>(plan).stride;
        break;
      case kSpread:
        need_of_positions(from, fields_of<SpreadStep>(plan).positions, i, kind);
        break;
      case kInverted:
        floats += fields_of<InvertedStep>(plan).expand.outputs;
        break;
      case kSplit: {
        need(from.outer_height == 0, "cuts windows of windows into windows");
        const int64_t window = fields_of<WindowsStep>(plan).window;
        to = {from.count * blocks_of(from.height, window) * blocks_of(from.width, window),
              window,
              window,
              from.height,
              from.width,
              from.whole_height,
              from.whole_width};
        break;
      }
      case kJoin: {
        const int64_t window = fields_of<WindowsStep>(plan).window;
        const int64_t count = blocks_of(from.whole_height, window) * blocks_of(from.whole_width, window);
        need(from.whole_height > 0 && from == Shape{from.count / count * count, window, window},
             "joins what are not the windows of a map");
        to = {from.count / count, from.whole_height, from.whole_width, from.outer_height, from.outer_width};
        break;
      }
      case kLite:
        stride = fields_of<LiteStep>(plan).stride;
        floats = 2 * std::max<int64_t>(fields_of<LiteStep>(plan).hidden, 16);
        break;
      case kBlock:
        floats = 2 * std::max<int64_t>(fields_of<BlockStep>(plan).hidden, 16);
        break;
      case kDown:
        stride = fields_of<DownStep>(plan).stride;
        floats = 2 * std::max(fields_of<DownStep>(plan).hidden1, fields_of<DownStep>(plan).hidden2);
        break;
      case kResize:
        to = resized(fields_of<ResizeStep>(plan), from, maps);
        need(to.whole_height == 0, "has the size of a map in windows");
        need(to.height <= kMostSide && to.width <= kMostSide, "makes too large a map");
        break;
      case kStateRows:
        to = {1, fields_of<StateRowsStep>(plan).rows, 1, 0, 0};
        break;
      case kDynamicLite:
        floats = 2 * fields_of<DynamicLiteStep>(plan).hidden;
        break;
    }
    if (kind == kLite || kind == kBlock || kind == kDown || kind == kResize || kind == kDynamicLite) {
      need(from.whole_height == 0, "reads a map in windows");
    }
    to.height = blocks_of(to.height, stride);
    to.width = blocks_of(to.width, stride);
    need(added(plan) < 0 || maps[added(plan)] == to, "adds a map of another size");
    need(attention(plan) < 0 || maps[attention(plan)] == to, "mixes slopes by a map of another size");
    step.in = from;
    maps[made.map] = step.out = to;
    const int64_t rows = to.count * to.height, pixels = rows * to.width;
    need(pixels <= kMostPixels, "makes a map of too many pixels");
    step.group = task_rows(rows, to.width, floats, most);
    step.products = products(plan) * pixels;
    step.tasks = blocks_of(rows, step.group);
    if (kind == kAttention) {
      step.tasks =
          to.count * fields_of<AttentionStep>(plan).heads * blocks_of(to.height * to.width, kAttentionTile);
    }
    sizes_[made.map] = std::max(sizes_[made.map], pixels * padded(made.channels) / (plan_.bf16 ? 2 : 1));
    records_ = std::max(records_, step.tasks * record_size(made));
  }

  const Plan& plan_;
  const float* weights_;
  const Calibration* calibration_ = nullptr;
  const Images& images_;
  std::vector<Step> steps_;
  std::vector<HandedOut> handed_out_;
  int64_t sizes_[kMostMaps] = {}, records_ = 0, memory_ = 0;
};

}  // namespace
}  // namespace mfk
