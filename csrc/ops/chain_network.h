// How a deployed chain of steps runs. No PyTorch in here, see run_network.h.
#pragma once

#include <algorithm>

#include "../cpu/deployed_chain.h"
#include "run_network.h"

namespace mfk {
namespace {

constexpr int64_t kMostSteps = 1024, kMostMaps = 8, kMostHandedOut = 8;

class ChainNetwork {
 public:
  // Whether this is a plan, and for so many weights and classes.
  static bool fits(const int64_t* words, int64_t count, int64_t weights, int64_t classes) {
    const auto& plan = *reinterpret_cast<const ChainPlan*>(words);
    const int64_t header = sizeof(ChainPlan) / 8, linear = sizeof(ChainLinear) / 8;
    if (count < header || plan.weights != weights || plan.maps < 1 || plan.maps > kMostMaps) return false;
    if (plan.linears < 0 || plan.linears > count / linear || (plan.linears > 0) != (classes > 0))
      return false;
    if (plan.steps < 1 || plan.steps > kMostSteps || count < header + plan.linears * linear) return false;
    int64_t next = header + plan.linears * linear, handed_out = 0;
    for (int64_t i = 0; i < plan.steps; ++i) {
      if (next + 2 > count || words[next + 1] < 0 || words[next + 1] > count - next - 2) return false;
      handed_out += words[next] == kHandOut;
      next += 2 + words[next + 1];
    }
    if (next != count || handed_out > kMostHandedOut || (handed_out > 0) == (classes > 0)) return false;
    return classes == 0 || linears_of(plan)[plan.linears - 1].linear.outputs >= classes;
  }
  static int64_t in_channels(const int64_t* words) {
    return reinterpret_cast<const ChainPlan*>(words)->in_channels;
  }

  ChainNetwork(const int64_t* words, const float* weights, const Images& images)
      : plan_(*reinterpret_cast<const ChainPlan*>(words)), weights_(weights), images_(images) {
    const auto* next = reinterpret_cast<const int64_t*>(linears_of(plan_) + plan_.linears);
    ChainMap maps[kMostMaps] = {};
    for (int64_t i = 0; i < plan_.steps; ++i) {
      steps_[i] = reinterpret_cast<const ChainStep*>(next);
      next += 2 + steps_[i]->words;
      tasks_[i] = 1;
      if (steps_[i]->kind < kFirstOfState) shape(i, maps);
      if (steps_[i]->kind == kHandOut) {
        const auto& step = fields<ChainHandOut>(i);
        handed_out_[handed_out_count_++] = {step.channels, maps[step.map].height, maps[step.map].width, {}};
      }
      if (steps_[i]->kind == kMix) tasks_[i] = blocks_of(fields<ChainMix>(i).blocks, kMixTask);
    }
    for (int64_t m = 0; m < plan_.maps; ++m) memory_ += padded(sizes_[m]);
    memory_ += padded(2 * records_) + padded(plan_.state);
  }

  bool bf16() const { return plan_.bf16; }
  const float* weights() const { return weights_; }
  int64_t linears() const { return plan_.linears; }
  DeployedLinear linear(int64_t i) const {
    const ChainLinear& layer = linears_of(plan_)[i];
    return {static_cast<PlanActivation>(layer.activation), layer.linear};
  }
  // The maps that are results, in their order; `to` is the caller's to fill in.
  int64_t handed_out() const { return handed_out_count_; }
  HandedOut& handed_out(int64_t i) { return handed_out_[i]; }
  // Floats of memory for a sample.
  int64_t memory() const { return memory_; }

  // See run_network; `done()` is called after each step.
  template <class Run, class Done>
  void features(int64_t sample, float* memory, float* out, Run run, Done done) const {
    ChainMap maps[kMostMaps];
    float* p = memory;
    for (int64_t m = 0; m < plan_.maps; ++m) {
      maps[m].data = p;
      p += padded(sizes_[m]);
    }
    ChainArgs args{};
    args.plan = &plan_;
    args.weights = weights_;
    args.state = p;
    args.records = reinterpret_cast<double*>(p + padded(plan_.state));
    args.images = &images_;
    args.sample = sample;
    args.scratch = scratch;
    const HandedOut* next = handed_out_;
    for (int64_t i = 0; i < plan_.steps; ++i) {
      args.kind = steps_[i]->kind;
      args.fields = reinterpret_cast<const int64_t*>(steps_[i] + 1);
      if (args.kind < kFirstOfState) {
        const auto& step = fields<ChainOut>(i);
        const int64_t in = input(i);
        if (in >= 0) args.in = with_data(in_[i], maps[in].data);
        if (args.kind == kPointwise && fields<ChainPointwise>(i).added >= 0) {
          args.added = with_data(out_[i], maps[fields<ChainPointwise>(i).added].data);
        }
        args.out = with_data(out_[i], maps[step.map].data);
        args.group = groups_[i];
        run(tasks_[i], [&](int64_t begin, int64_t end) { chain_map(args, begin, end); });
        args.last = &step;
        args.tasks = tasks_[i];
        args.pixels = out_[i].count * out_[i].height * out_[i].width;
      } else if (args.kind == kHandOut) {
        next++->write(bf16(), maps[fields<ChainHandOut>(i).map].data, sample, run);
      } else {
        run(tasks_[i], [&](int64_t begin, int64_t end) { chain_state(args, begin, end); });
      }
      done();
    }
    if (plan_.linears > 0) std::copy_n(args.state + plan_.features, linear(0).linear.inputs, out);
  }

 private:
  static const ChainLinear* linears_of(const ChainPlan& plan) {
    return reinterpret_cast<const ChainLinear*>(&plan + 1);
  }
  template <class T>
  const T& fields(int64_t i) const {
    return *reinterpret_cast<const T*>(steps_[i] + 1);
  }
  static ChainMap with_data(ChainMap map, void* data) {
    map.data = data;
    return map;
  }
  // The number of the map that a step reads; -1 for the image.
  int64_t input(int64_t i) const {
    return steps_[i]->kind == kImageConv ? -1 : reinterpret_cast<const int64_t*>(&fields<ChainOut>(i) + 1)[0];
  }

  // What step i makes of the maps, and in how many tasks.
  void shape(int64_t i, ChainMap* maps) {
    const int64_t kind = steps_[i]->kind, in = input(i);
    const auto& made = fields<ChainOut>(i);
    const ChainMap from = in < 0 ? ChainMap{nullptr, 1, images_.height, images_.width} : maps[in];
    ChainMap to = from;
    int64_t floats = padded(made.channels), most = kSecondCache,
            stride = 1;  // of a position's working memory
    if (kind == kImageConv || kind == kDenseConv) {
      const auto& step = fields<ChainConv>(i);
      stride = step.stride;
      if (kind == kDenseConv) floats = padded(step.in_channels * step.kernel * step.kernel);
      most = 98304;
    } else if (kind == kDepthwise) {
      stride = fields<ChainDepthwise>(i).stride;
    } else if (kind == kInverted) {
      floats += fields<ChainInverted>(i).expand.outputs;
    } else if (kind == kSplit) {
      const int64_t window = fields<ChainWindows>(i).window;
      whole_ = from;
      to = {nullptr, blocks_of(from.height, window) * blocks_of(from.width, window), window, window};
    } else if (kind == kJoin) {
      to = whole_;
    }
    to.height = blocks_of(to.height, stride);
    to.width = blocks_of(to.width, stride);
    in_[i] = from;
    maps[made.map] = out_[i] = to;
    const int64_t rows = to.count * to.height, pixels = rows * to.width;
    groups_[i] = task_rows(rows, to.width, floats, most);
    tasks_[i] = blocks_of(rows, groups_[i]);
    if (kind == kAttention) {
      tasks_[i] = to.count * blocks_of(to.height * to.width, kAttentionTile);
    }
    sizes_[made.map] = std::max(sizes_[made.map], pixels * padded(made.channels) / (plan_.bf16 ? 2 : 1));
    records_ = std::max(records_, tasks_[i] * chain_record_size(made));
  }

  const ChainPlan& plan_;
  const float* weights_;
  const Images& images_;
  const ChainStep* steps_[kMostSteps];
  ChainMap in_[kMostSteps], out_[kMostSteps], whole_{};
  int64_t groups_[kMostSteps] = {}, tasks_[kMostSteps], sizes_[kMostMaps] = {}, records_ = 0, memory_ = 0;
  HandedOut handed_out_[kMostHandedOut];
  int64_t handed_out_count_ = 0;
};

}  // namespace
}  // namespace mfk
