// How a deployed Mobile-Former runs. No PyTorch in here, see run_network.h.
#pragma once

#include <algorithm>
#include <utility>

#include "../cpu/deployed_mobile_former.h"
#include "run_network.h"

namespace mfk {
namespace {

constexpr int64_t kMostPasses = 256, kMostMapsOut = 8;

class MobileFormerNetwork {
 public:
  // Whether this is a plan, and for so many weights and classes.
  static bool fits(const int64_t* words, int64_t count, int64_t weights, int64_t classes) {
    const auto& plan = *reinterpret_cast<const MobileFormerPlan*>(words);
    const int64_t header = sizeof(MobileFormerPlan) / 8, pass = sizeof(PlanPass) / 8;
    if (count < header + pass || plan.passes < 1 || plan.passes > kMostPasses) return false;
    if (count != header + plan.passes * pass || plan.weights != weights) return false;
    int64_t handed_out = 0;
    for (int64_t i = 0; i < plan.passes; ++i) handed_out += passes_of(plan)[i].hand_out;
    if (classes == 0) return plan.classifier.outputs == 0 && handed_out > 0 && handed_out <= kMostMapsOut;
    return plan.classifier.outputs >= classes && handed_out == 0;
  }
  static int64_t in_channels(const int64_t* words) {
    return passes_of(*reinterpret_cast<const MobileFormerPlan*>(words))->in_channels;
  }

  MobileFormerNetwork(const int64_t* words, const float* weights, const Images& images)
      : plan_(*reinterpret_cast<const MobileFormerPlan*>(words)), weights_(weights), images_(images) {
    const MobileFormerPlan& plan = plan_;
    const PlanPass* passes = passes_of(plan);
    Shape shape{images.height, images.width};
    int64_t hidden1 = 0, hidden2 = 0, made = 0, records = 0;
    for (int64_t i = 0; i < plan.passes; ++i) {
      const PlanPass& pass = passes[i];
      shapes_[i] = shape;
      shape = {(shape.height + pass.stride - 1) / pass.stride, (shape.width + pass.stride - 1) / pass.stride};
      const int64_t floats = 2 * std::max({pass.hidden1, pass.hidden2, int64_t{16}});
      const int64_t group = task_rows(shape.height, shape.width, floats, kSecondCache);
      groups_[i] = group;
      tasks_[i] = (shape.height + group - 1) / group;
      if (pass.hand_out)
        handed_out_[handed_out_count_++] = {pass.out_channels, shape.height, shape.width, {}};
      map_ = std::max(map_, shape.height * shape.width * padded(pass.out_channels) / (plan.bf16 ? 2 : 1));
      hidden1 = std::max(hidden1, pass.hidden1);
      hidden2 = std::max({hidden2, pass.hidden2, pass.hidden1});
      made = std::max(made, pass.tokens.generate.outputs);
      if (pass.gather) records = std::max(records, tasks_[i] * record_size(plan, pass.out_channels));
    }
    shapes_[plan.passes] = shape;
    records_ = 2 * records;  // doubles
    const int64_t sizes[] = {plan.tokens * padded(plan.token_dim), 2 * hidden1, 2 * hidden2,
                             plan.tokens * made};
    for (int i = 0; i < 4; ++i) {
      sizes_[i] = padded(sizes[i]);
      state_ += sizes_[i];
    }
  }

  bool bf16() const { return plan_.bf16; }
  const float* weights() const { return weights_; }
  int64_t linears() const { return plan_.classifier.outputs > 0 ? 2 : 0; }
  DeployedLinear linear(int64_t i) const {
    return i == 0 ? DeployedLinear{kHardswish, plan_.fc} : DeployedLinear{kNoActivation, plan_.classifier};
  }

  // See ChainNetwork.
  int64_t handed_out() const { return handed_out_count_; }
  HandedOut& handed_out(int64_t i) { return handed_out_[i]; }
  // Floats of memory for a sample.
  int64_t memory() const { return 2 * map_ + padded(records_) + state_; }

  // From the image to the input of the classifier's first linear layer: pooled map and class tokens.
  // `run(tasks, f)` calls f(begin, end) over the tasks, perhaps on several threads; `done()` is called after
  // each step over the tokens and each pass, after the last of the one and after the head. Or the maps that
  // are results, without these two.
  template <class Run, class Done>
  void features(int64_t sample, float* memory, float* out, Run run, Done done) const {
    float *in = memory, *next = memory + map_;
    auto* gathered = reinterpret_cast<double*>(memory + 2 * map_);
    float* p = memory + 2 * map_ + padded(records_);
    float* parts[4];
    for (int i = 0; i < 4; ++i) {
      parts[i] = p;
      p += sizes_[i];
    }
    const TokenState state{parts[0], parts[1], parts[2], parts[3]};
    std::copy_n(weights_ + plan_.first_tokens, plan_.tokens * padded(plan_.token_dim), state.tokens);
    const PlanPass* passes = passes_of(plan_);
    const HandedOut* handed_out = handed_out_;
    int64_t records = 0;
    for (int64_t i = 0; i < plan_.passes; ++i) {
      const PlanPass& pass = passes[i];
      mobile_former_tokens({&plan_, &pass.tokens, i == 0 ? nullptr : &pass - 1, &pass, weights_, state,
                            gathered, records, scratch},
                           0, 1);
      done();
      PassArgs args{};
      args.plan = &plan_;
      args.pass = &pass;
      args.weights = weights_;
      args.state = state;
      args.images = &images_;
      args.sample = sample;
      args.in = in;
      args.height = shapes_[i].height;
      args.width = shapes_[i].width;
      args.out_height = shapes_[i + 1].height;
      args.out_width = shapes_[i + 1].width;
      args.out = next;
      args.group = groups_[i];
      args.gathered = gathered;
      args.scratch = scratch;
      run(tasks_[i], [&](int64_t begin, int64_t end) { mobile_former_pass(args, begin, end); });
      if (pass.hand_out) handed_out++->write(bf16(), next, sample, run);
      done();
      std::swap(in, next);
      records = tasks_[i];
    }
    if (handed_out_count_ > 0) return;
    mobile_former_tokens({&plan_, &plan_.last, passes + plan_.passes - 1, nullptr, weights_, state, gathered,
                          records, scratch},
                         0, 1);
    done();
    const Shape last = shapes_[plan_.passes];
    const HeadArgs head{&plan_, weights_, in, last.height * last.width, out, scratch};
    run((plan_.head.outputs + 31) / 32,
        [&](int64_t begin, int64_t end) { mobile_former_head(head, begin, end); });
    for (int64_t t = 0; t < plan_.class_tokens; ++t) {
      std::copy_n(state.tokens + t * padded(plan_.token_dim), plan_.token_dim,
                  out + plan_.head.outputs + t * plan_.token_dim);
    }
    done();
  }

 private:
  struct Shape {
    int64_t height, width;
  };

  const MobileFormerPlan& plan_;
  const float* weights_;
  const Images& images_;
  Shape shapes_[kMostPasses + 1];  // of each pass's input, and of the last output
  int64_t groups_[kMostPasses], tasks_[kMostPasses], sizes_[4];
  int64_t map_ = 0, records_ = 0, state_ = 0;
  HandedOut handed_out_[kMostMapsOut];
  int64_t handed_out_count_ = 0;
};

}  // namespace
}  // namespace mfk
