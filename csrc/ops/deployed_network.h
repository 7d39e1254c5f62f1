// How a deployed network runs: memory, threads, and the order of the steps. No PyTorch in here, so that a
// sanitizer can run it on plain threads (tests/sanitize).
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/deployed_mobile_former.h"
#include "../huge_pages.h"

namespace mfk {
namespace {

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Block = std::unique_ptr<float, Free>;

Block allocate(int64_t floats) {
  const size_t bytes = floats * sizeof(float), huge = size_t{1} << 21;
  const size_t alignment = bytes >= huge ? huge : 64;
  Block block(static_cast<float*>(std::aligned_alloc(alignment, (bytes / alignment + 1) * alignment)));
  if (block == nullptr) throw std::runtime_error("no memory for " + std::to_string(floats) + " floats");
  if (bytes >= huge) advise_huge_pages(reinterpret_cast<uintptr_t>(block.get()), bytes);
  return block;
}

// Working memory of the calling thread. It only grows, so that a steady state allocates nothing.
float* scratch(int64_t floats) {
  thread_local Block block;
  thread_local int64_t size = 0;
  if (floats > size) {
    block = allocate(floats);
    size = floats;
  }
  return block.get();
}

// Maps and token state of one call, taken from those that earlier calls gave back.
class Memory {
 public:
  explicit Memory(int64_t floats) : size_(floats) {
    std::lock_guard<std::mutex> lock(mutex());
    auto& blocks = pool();
    for (size_t i = 0; i < blocks.size(); ++i) {
      if (blocks[i].first < floats) continue;
      size_ = blocks[i].first;
      block_ = std::move(blocks[i].second);
      blocks.erase(blocks.begin() + i);
      return;
    }
    if (!blocks.empty()) blocks.pop_back();  // too small for today's images: replaced, not kept beside
    block_ = allocate(floats);
  }
  ~Memory() {
    std::lock_guard<std::mutex> lock(mutex());
    pool().emplace_back(size_, std::move(block_));
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  float* get() const { return block_.get(); }

 private:
  static std::mutex& mutex() {
    static std::mutex m;
    return m;
  }
  static std::vector<std::pair<int64_t, Block>>& pool() {
    static std::vector<std::pair<int64_t, Block>> blocks;
    return blocks;
  }
  int64_t size_;
  Block block_;
};

// Rows of a task: enough positions to use weights well while they are in the first cache, few enough that
// the rows between two convolutions stay in the second.
int64_t group_rows(const PlanPass& pass, int64_t height, int64_t width) {
  const int64_t row = width * std::max({pass.hidden1, pass.hidden2, int64_t{16}}) * 2;
  // At least four tasks for the threads, where the map is large enough.
  const int64_t positions = std::min<int64_t>(std::max<int64_t>(height * width / 4, 224), 896);
  const int64_t rows = std::min((positions + width - 1) / width, 122880 / row);
  return std::min(std::max<int64_t>(rows, 1), height);
}

// Images, any strides.
struct Images {
  const float* data;
  int64_t batch, height, width, stride_b, stride_c, stride_h, stride_w;
};

constexpr int64_t kMostPasses = 256;

class Network {
 public:
  Network(const MobileFormerPlan& plan, const float* weights, const Images& images)
      : plan_(plan), weights_(weights), images_(images) {
    const PlanPass* passes = passes_of(plan);
    Shape shape{images.height, images.width};
    int64_t hidden1 = 0, hidden2 = 0, made = 0, records = 0;
    for (int64_t i = 0; i < plan.passes; ++i) {
      const PlanPass& pass = passes[i];
      shapes_[i] = shape;
      shape = {(shape.height + pass.stride - 1) / pass.stride, (shape.width + pass.stride - 1) / pass.stride};
      const int64_t group = group_rows(pass, shape.height, shape.width);
      groups_[i] = group;
      tasks_[i] = (shape.height + group - 1) / group;
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

  // Floats of memory for a sample.
  int64_t memory() const { return 2 * map_ + padded(records_) + state_; }

  // From the image to the input of the classifier's first linear layer: pooled map and class tokens.
  // `run(tasks, f)` calls f(begin, end) over the tasks, perhaps on several threads; `done()` is called after
  // each step over the tokens and each pass, after the last of the one and after the head.
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
      args.in = in;
      if (i == 0) {
        args.in = images_.data + sample * images_.stride_b;
        args.stride_c = images_.stride_c;
        args.stride_h = images_.stride_h;
        args.stride_w = images_.stride_w;
      }
      args.height = shapes_[i].height;
      args.width = shapes_[i].width;
      args.out_height = shapes_[i + 1].height;
      args.out_width = shapes_[i + 1].width;
      args.out = next;
      args.group = groups_[i];
      args.gathered = gathered;
      args.scratch = scratch;
      run(tasks_[i], [&](int64_t begin, int64_t end) { mobile_former_pass(args, begin, end); });
      done();
      std::swap(in, next);
      records = tasks_[i];
    }
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
};

// The whole network: `out` (batch, classes). `parallel(tasks, f)` calls f(begin, end) over the tasks on at
// most `threads` threads; `done()` is called after each step on one thread, see Network::features.
template <class Parallel, class Done>
void run_network(const MobileFormerPlan& plan, const float* weights, const Images& images, int64_t classes,
                 float* out, int64_t threads, Parallel parallel, Done done) {
  const Network network(plan, weights, images);
  const int64_t batch = images.batch, width = padded(plan.fc.inputs), hidden = plan.fc.outputs;
  const int64_t last = plan.classifier.outputs, share = padded(network.memory());
  const bool by_sample = threads > 1 && batch >= threads;
  const Memory memory((by_sample ? threads : 1) * share + batch * (width + hidden + last));
  float* features = memory.get() + (by_sample ? threads : 1) * share;
  float* middle = features + batch * width;
  float* logits = middle + batch * hidden;
  if (by_sample) {
    parallel(threads, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t b = batch * t / threads; b < batch * (t + 1) / threads; ++b) {
          network.features(
              b, memory.get() + t * share, features + b * width, [](int64_t tasks, auto f) { f(0, tasks); },
              [] {});
        }
      }
    });
  } else {
    for (int64_t b = 0; b < batch; ++b) {
      auto run = [&](int64_t tasks, auto f) {
        if (threads > 1 && tasks > 1) {
          parallel(tasks, f);
        } else {
          f(0, tasks);
        }
      };
      network.features(b, memory.get(), features + b * width, run, done);
    }
  }
  auto linear = [&](const ClassifierArgs& args) {
    const int64_t panels = (args.linear.outputs + 31) / 32;
    parallel(panels, [&](int64_t begin, int64_t end) { mobile_former_classifier(args, begin, end); });
    done();
  };
  linear({&plan, plan.fc, weights, features, width, batch, 1, middle, hidden, scratch});
  linear({&plan, plan.classifier, weights, middle, hidden, batch, 0, logits, last, scratch});
  for (int64_t b = 0; b < batch; ++b) std::copy_n(logits + b * last, classes, out + b * classes);
}

}  // namespace
}  // namespace mfk
