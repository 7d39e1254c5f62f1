#include "../cpu/deployed_mobile_former.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <chrono>
#include <cstdlib>
#include <memory>
#include <mutex>

#include "common.h"

namespace mfk {
namespace {

constexpr const char* kOp = "deployed_mobile_former";

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Block = std::unique_ptr<float, Free>;

Block allocate(int64_t floats) {
  const size_t bytes = floats * sizeof(float), huge = size_t{1} << 21;
  const size_t alignment = bytes >= huge ? huge : 64;
  Block block(static_cast<float*>(std::aligned_alloc(alignment, (bytes / alignment + 1) * alignment)));
  STD_TORCH_CHECK(block != nullptr, kOp, ": no memory for ", floats, " floats");
#if defined(__linux__)
  if (bytes >= huge) madvise(block.get(), bytes, MADV_HUGEPAGE);
#endif
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

struct Shape {
  int64_t height, width;
};

class Network {
 public:
  Network(const MobileFormerPlan& plan, const float* weights, const Tensor& image)
      : plan_(plan), weights_(weights), image_(image) {
    const PlanPass* passes = passes_of(plan);
    Shape shape{image.size(2), image.size(3)};
    int64_t hidden1 = 0, hidden2 = 0, made = 0, records = 0;
    for (int64_t i = 0; i < plan.passes; ++i) {
      const PlanPass& pass = passes[i];
      shapes_.push_back(shape);
      shape = {(shape.height + pass.stride - 1) / pass.stride, (shape.width + pass.stride - 1) / pass.stride};
      const int64_t group = group_rows(pass, shape.height, shape.width);
      groups_.push_back(group);
      tasks_.push_back((shape.height + group - 1) / group);
      map_ = std::max(map_, shape.height * shape.width * padded(pass.out_channels));
      hidden1 = std::max(hidden1, pass.hidden1);
      hidden2 = std::max({hidden2, pass.hidden2, pass.hidden1});
      made = std::max(made, pass.tokens.generate.outputs);
      if (pass.gather) records = std::max(records, tasks_.back() * record_size(plan, pass.out_channels));
    }
    shapes_.push_back(shape);
    records_ = 2 * records;  // doubles
    sizes_ = {plan.tokens * padded(plan.token_dim), 2 * hidden1, 2 * hidden2, plan.tokens * made};
    state_ = 0;
    for (int64_t& size : sizes_) {
      size = (size + 15) / 16 * 16;
      state_ += size;
    }
  }

  // Floats of memory for a sample.
  int64_t memory() const { return 2 * map_ + (records_ + 15) / 16 * 16 + state_; }

  // From the image to the input of the classifier's first linear layer: pooled map and class tokens.
  // `run(tasks, f)` calls f(begin, end) over the tasks, perhaps on several threads; `done()` is called after
  // each step over the tokens and each pass, after the last of the one and after the head.
  template <class Run, class Done>
  void features(int64_t sample, float* memory, float* out, Run run, Done done) const {
    float *in = memory, *next = memory + map_;
    auto* gathered = reinterpret_cast<double*>(memory + 2 * map_);
    float* p = memory + 2 * map_ + (records_ + 15) / 16 * 16;
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
        args.in = image_.const_data_ptr<float>() + sample * image_.stride(0);
        args.stride_c = image_.stride(1);
        args.stride_h = image_.stride(2);
        args.stride_w = image_.stride(3);
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
    const HeadArgs head{&plan_, weights_, in, shapes_.back().height * shapes_.back().width, out, scratch};
    run((plan_.head.outputs + 31) / 32,
        [&](int64_t begin, int64_t end) { mobile_former_head(head, begin, end); });
    for (int64_t t = 0; t < plan_.class_tokens; ++t) {
      std::copy_n(state.tokens + t * padded(plan_.token_dim), plan_.token_dim,
                  out + plan_.head.outputs + t * plan_.token_dim);
    }
    done();
  }

 private:
  const MobileFormerPlan& plan_;
  const float* weights_;
  const Tensor& image_;
  std::vector<Shape> shapes_;  // of each pass's input, and of the last output
  std::vector<int64_t> groups_, tasks_;
  int64_t map_ = 0, records_ = 0, state_ = 0;
  std::vector<int64_t> sizes_;
};

template <class F>
void run_in_parallel(int64_t tasks, F f) {
  torch::stable::parallel_for(0, tasks, 1, f);
}

template <class Done>
Tensor run(const Tensor& image, const Tensor& weights, const Tensor& plan_tensor, int64_t classes,
           Done done) {
  STD_TORCH_CHECK(image.dim() == 4, kOp, ": x must have 4 dimensions (B, C, H, W), got ", image.dim());
  STD_TORCH_CHECK(image.scalar_type() == ScalarType::Float, kOp, ": x must be float32");
  STD_TORCH_CHECK(image.is_cpu() && weights.is_cpu() && plan_tensor.is_cpu(), kOp, ": x must be on the CPU");
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float && weights.is_contiguous() &&
                      plan_tensor.scalar_type() == ScalarType::Long && plan_tensor.is_contiguous() &&
                      plan_tensor.numel() * sizeof(int64_t) >= sizeof(MobileFormerPlan) + sizeof(PlanPass),
                  kOp, ": weights and plan must be those that deploy made");
  const auto& plan = *reinterpret_cast<const MobileFormerPlan*>(plan_tensor.const_data_ptr<int64_t>());
  STD_TORCH_CHECK(
      plan_tensor.numel() * sizeof(int64_t) == sizeof(MobileFormerPlan) + plan.passes * sizeof(PlanPass) &&
          weights.numel() == plan.weights && plan.classifier.outputs >= classes,
      kOp, ": weights and plan must be those that deploy made");
  STD_TORCH_CHECK(image.size(1) == passes_of(plan)->in_channels, kOp, ": x must have ",
                  passes_of(plan)->in_channels, " channels, got ", image.size(1));
  STD_TORCH_CHECK(image.size(2) >= 1 && image.size(3) >= 1, kOp, ": x must have at least one pixel");
  const int64_t batch = image.size(0);
  Tensor out = empty({batch, classes}, ScalarType::Float, image);
  if (batch == 0) return out;
  const Network network(plan, weights.const_data_ptr<float>(), image);
  const int64_t width = (plan.fc.inputs + 15) / 16 * 16, hidden = plan.fc.outputs,
                last = plan.classifier.outputs;
  const int64_t threads = torch::stable::get_num_threads();
  const bool by_sample = threads > 1 && batch >= threads;
  const int64_t share = (network.memory() + 15) / 16 * 16;
  const Memory memory((by_sample ? threads : 1) * share + batch * (width + hidden + last));
  float* features = memory.get() + (by_sample ? threads : 1) * share;
  float* middle = features + batch * width;
  float* logits = middle + batch * hidden;
  if (by_sample) {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t b = batch * t / threads; b < batch * (t + 1) / threads; ++b) {
          network.features(
              b, memory.get() + t * share, features + b * width, [](int64_t tasks, auto f) { f(0, tasks); },
              done);
        }
      }
    });
  } else {
    for (int64_t b = 0; b < batch; ++b) {
      network.features(
          b, memory.get(), features + b * width,
          [&](int64_t tasks, auto f) {
            if (threads > 1 && tasks > 1) {
              run_in_parallel(tasks, f);
            } else {
              f(0, tasks);
            }
          },
          done);
    }
  }
  const float* w = weights.const_data_ptr<float>();
  auto linear = [&](const ClassifierArgs& args) {
    const int64_t panels = (args.linear.outputs + 31) / 32;
    run_in_parallel(panels, [&](int64_t begin, int64_t end) { mobile_former_classifier(args, begin, end); });
  };
  linear({plan.fc, w, features, width, batch, 1, middle, hidden});
  done();
  linear({plan.classifier, w, middle, hidden, batch, 0, logits, last});
  done();
  for (int64_t b = 0; b < batch; ++b) {
    std::copy_n(logits + b * last, classes, out.mutable_data_ptr<float>() + b * classes);
  }
  return out;
}

Tensor forward(const Tensor& image, const Tensor& weights, const Tensor& plan, int64_t classes) {
  return run(image, weights, plan, classes, [] {});
}

// Seconds, float64, that each step takes on one thread for a batch of one: for each pass its tokens and
// itself, then the last tokens, the head, and the two linear layers.
Tensor times(const Tensor& image, const Tensor& weights, const Tensor& plan, int64_t classes) {
  STD_TORCH_CHECK(image.dim() == 4 && image.size(0) == 1, kOp, ": x must be one image");
  using Clock = std::chrono::steady_clock;
  std::vector<double> seconds;
  auto before = Clock::now();
  run(image, weights, plan, classes, [&] {
    const auto now = Clock::now();
    seconds.push_back(std::chrono::duration<double>(now - before).count());
    before = now;
  });
  Tensor out = empty({static_cast<int64_t>(seconds.size())}, ScalarType::Double, image);
  std::copy(seconds.begin(), seconds.end(), out.mutable_data_ptr<double>());
  return out;
}

}  // namespace
}  // namespace mfk

STABLE_TORCH_LIBRARY_FRAGMENT(mfkernels, m) {
  m.def("deployed_mobile_former(Tensor x, Tensor weights, Tensor plan, int classes) -> Tensor");
  m.def("deployed_mobile_former_times(Tensor x, Tensor weights, Tensor plan, int classes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mfkernels, CPU, m) {
  m.impl("deployed_mobile_former", TORCH_BOX(&mfk::forward));
  m.impl("deployed_mobile_former_times", TORCH_BOX(&mfk::times));
}
