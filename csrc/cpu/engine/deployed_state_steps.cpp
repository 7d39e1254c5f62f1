#include "activation.h"
#include "activation_pass.h"
#include "as_stored.h"
#include "deployed_narrow.h"
#include "deployed_plan.h"

namespace mfk {
namespace MFK_ISA {
namespace {

struct StateSteps {
  const StepArgs& args;

  const float* at(int64_t offset) const { return args.weights + offset; }
  float* place(int64_t offset) const { return args.state + offset; }

  template <class Epilogue>
  void linear(const PlanLinear& l, int64_t rows, const float* in, int64_t in_stride, float* out,
              int64_t out_stride, Epilogue epilogue) const {
    if constexpr (std::is_same<Stored, float>::value) {
      const int64_t narrow = args.plan->narrow;
      if (narrow > 0) {
        const Rows<float> x{in, in_stride, 1, l.inputs, 0};
        return narrow_linear({l, narrow, args.weights, 0, l.outputs, x, rows, out, out_stride, false},
                             epilogue);
      }
    }
    Buffer<Stored> room(rows * padded(l.inputs));
    gemm(rows, as_stored(in, rows, in_stride, l.inputs, room), Weights{at(l.weight), l.outputs}, out,
         out_stride, epilogue);
  }

  // Sum i of channel c over the last step's map: 0 of values, 1 of squares.
  double sum(int64_t i, int64_t c) const {
    const int64_t record = record_size(*args.last), width = padded(args.last->channels);
    const double* sums = args.records + record - args.last->sums * width + i * width + c;
    double total = 0;
    for (int64_t task = 0; task < args.tasks; ++task) total += sums[task * record];
    return total;
  }
  void means(int64_t channels, float* out) const {
    for (int64_t c = 0; c < padded(channels); ++c) {
      out[c] = c < channels ? static_cast<float>(sum(0, c) / args.pixels) : 0.0f;
    }
  }

  void copy(const CopyStep& step) const {
    const float* source = step.weights ? at(step.source) : place(step.source);
    memmove(place(step.target), source, step.floats * sizeof(float));
  }

  void linear(const LinearStep& step) const {
    const PlanLinear& l = step.linear;
    const float* bias = at(l.bias);
    float* target = place(step.target);
    auto run = [&](auto epilogue) {
      linear(l, step.rows, place(step.source), step.source_stride, target, step.target_stride, epilogue);
    };
    if (step.added) return run(AddResidual<float>{bias, target, step.target_stride});
    run(AddBiasActivation{bias, step.activation});
    if (!has_pass(step.activation)) return;
    for (int64_t t = 0; t < step.rows; ++t) {
      activation_pass(step.activation, target + t * step.target_stride, l.outputs);
    }
  }

  void norm(const NormStep& step) const {
    constexpr int64_t n = kLanes<float>;
    const int64_t width = step.width, stride = padded(width);
    const float *gamma = at(step.gamma), *beta = gamma + stride;
    const double eps = from_bits(step.eps);
    for (int64_t t = 0; t < step.rows; ++t) {
      const float* x = place(step.source) + t * stride;
      float* to = place(step.target) + t * stride;
      vec<float> sums{}, squares{};
      for (int64_t i = 0; i < stride; i += n) sums += load(x + i);
      const float mean = static_cast<float>(sum_lanes<float>(sums) / width);
      for (int64_t i = 0; i < stride; i += n) {
        const vec<float> off = load(x + i) - mean;
        squares += off * off;
      }
      // The padding, too, was `mean` off.
      const double variance = (sum_lanes<float>(squares) - (stride - width) * (double{mean} * mean)) / width;
      const float scale = static_cast<float>(1 / __builtin_sqrt((variance > 0 ? variance : 0) + eps));
      for (int64_t i = 0; i < stride; i += n) {  // gamma and beta are zero there
        store(to + i, (load(x + i) - mean) * scale * load(gamma + i) + load(beta + i));
      }
    }
  }

  void attend(const AttendStep& step) const {
    const int64_t tokens = step.rows, depth = step.depth;
    const float scale = 1 / __builtin_sqrtf(static_cast<float>(depth));
    Buffer<float> logits(round_up(tokens, 16));
    memset(place(step.target), 0, tokens * step.target_stride * sizeof(float));
    for (int64_t head = 0; head < step.heads; ++head) {
      auto row = [&](int64_t of, int64_t t) { return place(of) + t * step.stride + head * depth; };
      for (int64_t t = 0; t < tokens; ++t) {
        const float* query = row(step.queries, t);
        float top = -__FLT_MAX__;
        for (int64_t s = 0; s < tokens; ++s) {
          const float* key = row(step.keys, s);
          vec<float> sums{};
          int64_t c = 0;
          for (; c + kLanes<float> <= depth; c += kLanes<float>) sums += load(query + c) * load(key + c);
          float sum = static_cast<float>(sum_lanes<float>(sums));
          for (; c < depth; ++c) sum += query[c] * key[c];
          logits[s] = sum * scale;
          top = logits[s] > top ? logits[s] : top;
        }
        float sum = 0;
        for (int64_t s = 0; s < tokens; ++s) {
          logits[s] = exp_scalar<float>(logits[s] - top);
          sum += logits[s];
        }
        float* to = place(step.target) + t * step.target_stride + head * depth;
        for (int64_t s = 0; s < tokens; ++s) {
          const float weight = logits[s] / sum;
          const float* value = row(step.values, s);
          for (int64_t c = 0; c < depth; ++c) to[c] += weight * value[c];
        }
      }
    }
  }

  void combine(const CombineStep& step) const {
    const int64_t columns = padded(step.channels), depth = step.channels / step.heads;
    const int64_t pairs = step.heads * step.tokens, record = record_size(*args.last);
    const double* gathered = args.records;
    Buffer<double> pixels(depth);
    memset(place(step.target), 0, step.tokens * columns * sizeof(float));
    for (int64_t i = 0; i < pairs; ++i) {
      double top = gathered[i];
      for (int64_t task = 1; task < args.tasks; ++task) {
        const double other = gathered[task * record + i];
        top = other > top ? other : top;
      }
      double sum = 0;
      for (int64_t c = 0; c < depth; ++c) pixels[c] = 0;
      for (int64_t task = 0; task < args.tasks; ++task) {
        const double* part = gathered + task * record;
        const double weight = exp_scalar<float>(static_cast<float>(part[i] - top));
        sum += weight * part[pairs + i];
        const double* own = part + 2 * pairs + i * depth;
        for (int64_t c = 0; c < depth; ++c) pixels[c] += weight * own[c];
      }
      const double norm = 1 / sum;
      float* row = place(step.target) + (i % step.tokens) * columns + i / step.tokens * depth;
      for (int64_t c = 0; c < depth; ++c) row[c] = static_cast<float>(pixels[c] * norm);
    }
  }

  void gate(const GateStep& step) const {
    const int64_t columns = padded(step.channels);
    for (int64_t t = 0; t < step.rows; ++t) {
      for (int64_t c = 0; c < columns; c += kLanes<float>) {
        float* to = place(step.at) + t * step.at_stride + c;
        store(to, load(to) * relu6(load(place(step.gates) + t * step.stride + c) + 3.0f) / 3);
      }
    }
  }

  void slopes(const SlopesStep& step) const {
    const PlanLinear& l = step.linear;
    const int64_t channels = l.outputs / step.functions;
    float* to = place(step.target);
    linear(l, step.rows, place(step.source), step.source_stride, to, 2 * channels,
           AddBiasTwoHardsigmoid{at(l.bias)});
    const bool sorted = step.rows == 1;
    for (int64_t row = 0; row < step.rows; ++row, to += 2 * channels) {
      if (step.functions == 1) {
        memcpy(to + channels, to, channels * sizeof(float));
        continue;
      }
      for (int64_t c = 0; c < channels; c += kLanes<float>) {
        const vec<float> first = load(to + c), second = load(to + channels + c) - 1.0f;
        store(to + c, sorted ? larger(first, second) : first);
        store(to + channels + c, sorted ? smaller(first, second) : second);
      }
    }
  }

  void pooled(const PooledStep& step, int64_t begin, int64_t end) const {
    constexpr int64_t kRun = 64, n = kLanes<float>;
    const PlanLinear& l = step.linear;
    const int64_t stride = padded(step.in_channels), rows = weight_rows(l.inputs);
    const int64_t pixels = args.in.count * args.in.height * args.in.width;
    const auto* in = static_cast<const Stored*>(args.in.data);
    Buffer<float> room(kRun * kOutputsTask);
    float* const tile = room;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t o = task * kOutputsTask, rest = l.outputs - o;
      const int64_t outputs = rest < kOutputsTask ? rest : kOutputsTask;
      const Weights w{at(l.weight) + o * rows, outputs};
      WideSum<float> sums[kOutputsTask / n];
      for (int64_t p = 0; p < pixels; p += kRun) {
        const int64_t count = pixels - p < kRun ? pixels - p : kRun;
        const Rows<Stored> x{in + p * stride, stride, 1, l.inputs, 0};
        const float *bias = at(l.bias) + o, *slopes = place(step.slopes) + o;
        if (step.slopes >= 0) {
          gemm(count, x, w, tile, outputs, AddBiasDynamicRelu{bias, slopes, slopes + l.outputs});
        } else {
          gemm(count, x, w, tile, outputs, AddBiasRelu6{bias});
        }
        for (int64_t v = 0; v * n < outputs; ++v) {
          vec<float> run{};
          for (int64_t i = 0; i < count; ++i) run += load(tile + i * outputs + v * n);
          sums[v].add(run);
        }
      }
      for (int64_t v = 0; v * n < outputs; ++v) {
        double lanes[n];
        sums[v].store_upto(lanes, n);
        float* to = place(step.target) + o + v * n;
        for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(lanes[i] / pixels);
        store(to, hardswish(load(to)));
      }
    }
  }

  void collect(const CollectStep& step, int64_t begin, int64_t end) const {
    constexpr int64_t kRun = 64, n = kLanes<float>;
    constexpr int kTogether = 4;  // tokens
    const int64_t columns = padded(step.in_channels), row = weights_of_position(step.tokens);
    const auto* in = static_cast<const Stored*>(args.in.data);
    const float* bias = at(step.bias);
    const int64_t until = end * kOutputsTask < columns ? end * kOutputsTask : columns;
    for (int64_t c = begin * kOutputsTask; c < until; c += n) {
      for (int64_t t = 0; t < step.tokens; t += kTogether) {
        WideSum<float> sums[kTogether];
        for (int64_t p = 0; p < step.positions; p += kRun) {
          const int64_t last = p + kRun < step.positions ? p + kRun : step.positions;
          vec<float> runs[kTogether] = {};
          for (int64_t i = p; i < last; ++i) {
            const vec<float> x = load(in + i * columns + c);
            const float* weights = at(step.weights) + i * row + t;
            for (int k = 0; k < kTogether; ++k) runs[k] += x * weights[k];
          }
          for (int k = 0; k < kTogether; ++k) sums[k].add(runs[k]);
        }
        for (int64_t k = 0; k < kTogether && t + k < step.tokens; ++k) {
          double lanes[n];
          sums[k].store_upto(lanes, n);
          float* to = place(step.target) + (t + k) * columns + c;
          for (int64_t i = 0; i < n; ++i) {
            const double sum = c + i < step.in_channels ? lanes[i] + bias[t + k] : 0;
            to[i] = static_cast<float>(step.added ? to[i] + sum : sum);
          }
        }
      }
    }
  }

  void turn(const TurnStep& step) const {
    const int64_t width = padded(step.rows);
    for (int64_t c = 0; c < step.columns; ++c) {
      float* to = place(step.target) + c * width;
      for (int64_t r = 0; r < width; ++r) {
        const float value = r < step.rows ? place(step.source)[r * step.source_stride + c] : 0.0f;
        to[r] = step.added ? to[r] + value : value;
      }
    }
  }

  void kernels(const KernelsStep& step) const {
    const int64_t width = padded(step.token_dim), inputs = width + padded(step.channels);
    const int64_t hidden = step.hidden.outputs;
    Buffer<float> in(inputs), middle(hidden);
    float* to = place(step.target);
    memcpy(in, place(step.token), width * sizeof(float));
    means(step.channels, in + width);
    linear(step.hidden, 1, in, inputs, middle, hidden, AddBiasRelu{at(step.hidden.bias)});
    linear(step.scores, 1, middle, hidden, to, 0, AddBias{at(step.scores.bias)});
    float total = 1;
    if (step.softmax) {
      float top = to[0];
      for (int64_t k = 1; k < step.kernels; ++k) top = to[k] > top ? to[k] : top;
      total = 0;
      for (int64_t k = 0; k < step.kernels; ++k) total += to[k] = exp_scalar<float>(to[k] - top);
    }
    for (int64_t k = 0; k < step.kernels; ++k) {
      to[k] = step.softmax ? to[k] / total : 1 / (1 + exp_scalar<float>(-to[k]));
    }
  }

  template <class T>
  void mix(const MixStep& step, int64_t begin, int64_t end) const {
    constexpr int64_t n = kLanes<float>;
    const float* attention = place(step.attention);
    const T* from = reinterpret_cast<const T*>(at(step.source));
    T* to = reinterpret_cast<T*>(place(step.target));
    const int64_t until = end * kMixTask < step.blocks ? end * kMixTask : step.blocks;
    for (int64_t block = begin * kMixTask; block < until; ++block) {
      const T* first = from + block * (step.kernels + 1) * 16;
      for (int64_t i = 0; i < 16; i += n) {
        vec<float> sum = load(first + i);
        for (int64_t k = 0; k < step.kernels; ++k) sum += attention[k] * load(first + (k + 1) * 16 + i);
        store(to + block * 16 + i, sum);
      }
    }
  }

  void affine(const AffineStep& step) const {
    const int64_t channels = step.channels, width = padded(channels);
    const float *gamma = at(step.gamma), *beta = at(step.beta);
    float *factor = place(step.target), *summand = factor + width;
    memset(factor, 0, 2 * width * sizeof(float));
    const double eps = from_bits(step.eps);
    if (step.norm == kGroupNorm) {
      double total = 0, squares = 0;
      for (int64_t c = 0; c < channels; ++c) {
        total += sum(0, c);
        squares += sum(1, c);
      }
      const double count = static_cast<double>(channels * args.pixels), mean = total / count;
      const double variance = squares / count - mean * mean;
      const double scale = 1 / __builtin_sqrt((variance > 0 ? variance : 0) + eps);
      for (int64_t c = 0; c < channels; ++c) {
        factor[c] = static_cast<float>(scale * gamma[c]);
        summand[c] = static_cast<float>(beta[c] - mean * factor[c]);  // which it must cancel as rounded
      }
      return;
    }
    // x + gamma (x response) + beta
    double mean = 0;
    if (step.norm == kResponseNormOfChannels) {
      for (int64_t c = 0; c < channels; ++c) mean += __builtin_sqrt(sum(1, c));
      mean /= channels;
    }
    for (int64_t c = 0; c < channels; ++c) {
      const double norm = __builtin_sqrt(sum(1, c));
      const double response = norm / ((step.norm == kResponseNorm ? norm : mean) + eps);
      factor[c] = static_cast<float>(1 + gamma[c] * response);
      summand[c] = beta[c];
    }
  }
};

}  // namespace

void state_step(const StepArgs& args, int64_t begin, int64_t end) {
  const StateSteps state{args};
  switch (args.kind) {
    case kCopy:
      return state.copy(fields_of<CopyStep>(args));
    case kLinear:
      return state.linear(fields_of<LinearStep>(args));
    case kNorm:
      return state.norm(fields_of<NormStep>(args));
    case kAttend:
      return state.attend(fields_of<AttendStep>(args));
    case kCombine:
      return state.combine(fields_of<CombineStep>(args));
    case kGate:
      return state.gate(fields_of<GateStep>(args));
    case kSlopes:
      return state.slopes(fields_of<SlopesStep>(args));
    case kKernels:
      return state.kernels(fields_of<KernelsStep>(args));
    case kMix: {
      const auto& step = fields_of<MixStep>(args);
      return step.matrix ? state.mix<Stored>(step, begin, end) : state.mix<float>(step, begin, end);
    }
    case kAffine:
      return state.affine(fields_of<AffineStep>(args));
    case kCollect:
      return state.collect(fields_of<CollectStep>(args), begin, end);
    case kTurn:
      return state.turn(fields_of<TurnStep>(args));
    case kPool: {
      const auto& step = fields_of<PoolStep>(args);
      return state.means(step.channels, args.state + step.target);
    }
    default:
      return state.pooled(fields_of<PooledStep>(args), begin, end);
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
