#include "deployed_mobile_former.h"
#include "gemm.h"

namespace mfk {
namespace MFK_ISA {
namespace {

// (rows, channels), each row padded, as the left side of a product; in `room` where they must be rounded.
MFK_INLINE Rows<Stored> as_stored(const float* in, int64_t rows, int64_t stride, int64_t channels,
                                  Stored* room) {
  if constexpr (sizeof(Stored) == sizeof(float)) {
    return {reinterpret_cast<const Stored*>(in), stride, 1, channels, 0};
  }
  const int64_t width = padded(channels);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < width; c += kLanes<float>) store(room + r * width + c, load(in + r * stride + c));
  }
  return {room, width, 1, channels, 0};
}

struct Step {
  const TokensArgs& args;
  const PlanTokens& plan;
  const float* weights;
  const int64_t tokens, heads, width, stride;  // stride: padded token width
  Stored* left = nullptr;                      // room for the left side of a product

  explicit Step(const TokensArgs& a)
      : args(a),
        plan(*a.step),
        weights(a.weights),
        tokens(a.plan->tokens),
        heads(a.plan->heads),
        width(a.plan->token_dim),
        stride(padded(width)) {}

  template <class Epilogue>
  void linear(const PlanLinear& l, int64_t rows, const float* in, int64_t in_stride, float* out,
              int64_t out_stride, Epilogue epilogue) const {
    gemm(rows, as_stored(in, rows, in_stride, l.inputs, left), Weights{weights + l.weight, l.outputs}, out,
         out_stride, epilogue);
  }
  const float* bias(const PlanLinear& l) const { return weights + l.bias; }

  // Layer norm of each token, epsilon 1e-5, in place.
  void normalise(float* x, int64_t norm) const {
    constexpr int64_t n = kLanes<float>;
    const float *gamma = weights + norm, *beta = gamma + stride;
    for (int64_t t = 0; t < tokens; ++t) {
      float* row = x + t * stride;  // zero beyond `width`
      vec<float> sums{}, squares{};
      for (int64_t i = 0; i < stride; i += n) sums += load(row + i);
      const float mean = static_cast<float>(sum_lanes<float>(sums) / width);
      for (int64_t i = 0; i < stride; i += n) {
        const vec<float> off = load(row + i) - mean;
        squares += off * off;
      }
      // The padding, too, was `mean` off.
      const double variance = (sum_lanes<float>(squares) - (stride - width) * (double{mean} * mean)) / width;
      const float scale = static_cast<float>(1 / __builtin_sqrt(variance + 1e-5));
      for (int64_t i = 0; i < stride; i += n) {  // gamma and beta are zero there
        store(row + i, (load(row + i) - mean) * scale * load(gamma + i) + load(beta + i));
      }
    }
  }

  // What the tasks of the last pass gathered, put together: (tokens, padded channels).
  void combine(float* out, int64_t channels) const {
    const int64_t columns = padded(channels), depth = channels / heads, pairs = heads * tokens;
    const int64_t record = record_size(*args.plan, channels);
    memset(out, 0, tokens * columns * sizeof(float));
    for (int64_t i = 0; i < pairs; ++i) {
      double top = args.gathered[i];
      for (int64_t r = 1; r < args.records; ++r) {
        const double other = args.gathered[r * record + i];
        top = other > top ? other : top;
      }
      double* total = reinterpret_cast<double*>(args.scratch(0));
      double sum = 0;
      for (int64_t c = 0; c < depth; ++c) total[c] = 0;
      for (int64_t r = 0; r < args.records; ++r) {
        const double* part = args.gathered + r * record;
        const double weight = exp_scalar<float>(static_cast<float>(part[i] - top));
        sum += weight * part[pairs + i];
        const double* pixels = part + 2 * pairs + i * depth;
        for (int64_t c = 0; c < depth; ++c) total[c] += weight * pixels[c];
      }
      const double norm = 1 / sum;
      float* row = out + (i % tokens) * columns + i / tokens * depth;
      for (int64_t c = 0; c < depth; ++c) row[c] = static_cast<float>(total[c] * norm);
    }
  }
  void apply_gate(float* x, int64_t columns) const {
    const PlanPass& before = *args.before;
    const int64_t row = before.tokens.generate.outputs;
    const float* gates = args.state.made + (before.scatter ? 3 : 1) * columns;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t c = 0; c < columns; c += kLanes<float>) {
        float* at = x + t * columns + c;
        store(at, load(at) * relu6(load(gates + t * row + c) + 3.0f) / 3);
      }
    }
  }

  // Attention of the tokens to each other; keys and values are the tokens themselves.
  void attend(const float* q, const float* x, float* out) const {
    const int64_t count = args.plan->former_heads, depth = width / count;
    const float scale = 1 / __builtin_sqrtf(static_cast<float>(depth));
    float* logits = args.scratch(0);
    for (int64_t head = 0; head < count; ++head) {
      for (int64_t t = 0; t < tokens; ++t) {
        const float* query = q + t * stride + head * depth;
        float top = -__FLT_MAX__;
        for (int64_t s = 0; s < tokens; ++s) {
          const float* key = x + s * stride + head * depth;
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
        float* to = out + t * stride + head * depth;
        for (int64_t c = 0; c < depth; ++c) to[c] = 0;
        for (int64_t s = 0; s < tokens; ++s) {
          const float weight = logits[s] / sum;
          const float* value = x + s * stride + head * depth;
          for (int64_t c = 0; c < depth; ++c) to[c] += weight * value[c];
        }
      }
    }
  }

  void former(float* a, float* b) const {
    float* x = args.state.tokens;
    linear(plan.former_query, tokens, x, stride, a, stride, AddBias{bias(plan.former_query)});
    attend(a, x, b);
    linear(plan.former_mix, tokens, b, stride, x, stride,
           AddResidual<float>{bias(plan.former_mix), x, stride});
    normalise(x, plan.former_norm);
    if (!plan.ffn) return;
    const int64_t hidden = plan.ffn_in.outputs;
    linear(plan.ffn_in, tokens, x, stride, a, hidden, AddBiasGelu{bias(plan.ffn_in)});
    linear(plan.ffn_out, tokens, a, hidden, x, stride, AddResidual<float>{bias(plan.ffn_out), x, stride});
    normalise(x, plan.ffn_norm);
  }

  // The slopes of both activations of the next pass: the larger of each channel, then the smaller.
  void hyper(float* hidden) const {
    const float* token = args.state.tokens + args.plan->hyper_token * stride;
    linear(plan.squeeze, 1, token, stride, hidden, 0, AddBiasRelu{bias(plan.squeeze)});
    slopes(plan.slopes1, hidden, args.state.slopes1);
    slopes(plan.slopes2, hidden + plan.slopes1.inputs, args.state.slopes2);
  }
  void slopes(const PlanLinear& l, const float* hidden, float* out) const {
    const int64_t channels = l.outputs / 2;
    linear(l, 1, hidden, 0, out, 0, AddBiasTwoHardsigmoid{bias(l)});
    for (int64_t c = 0; c < channels; c += kLanes<float>) {
      const vec<float> first = load(out + c), second = load(out + channels + c) - 1.0f;
      store(out + c, first > second ? first : second);
      store(out + channels + c, first > second ? second : first);
    }
  }

  void run() {
    const int64_t columns = plan.bridge_channels > 0 ? padded(plan.bridge_channels) : 0;
    int64_t widest = stride;
    auto at_least = [&](int64_t n) { widest = n > widest ? n : widest; };
    at_least(columns);
    if (plan.former && plan.ffn) at_least(plan.ffn_in.outputs);
    at_least(plan.squeeze.outputs);
    // At the front, room for the logits of a token, or for a row of doubles.
    const int64_t front = round_up(tokens > 2 * columns ? tokens : 2 * columns, 16);
    float* a = args.scratch(front + 3 * tokens * widest) + front;
    float* b = a + tokens * widest;
    left = reinterpret_cast<Stored*>(b + tokens * widest);
    if (plan.bridge_channels > 0) {
      combine(a, plan.bridge_channels);
      if (plan.gate) apply_gate(a, columns);
      float* x = args.state.tokens;
      linear(plan.project, tokens, a, columns, x, stride, AddResidual<float>{bias(plan.project), x, stride});
      normalise(x, plan.norm);
    }
    if (plan.former) former(a, b);
    if (args.pass == nullptr) return;
    if (plan.squeeze.outputs > 0) hyper(a);
    if (plan.generate.outputs == 0) return;
    linear(plan.generate, tokens, args.state.tokens, stride, args.state.made, plan.generate.outputs,
           AddBias{bias(plan.generate)});
  }
};

}  // namespace

void mobile_former_tokens(const TokensArgs& args, int64_t, int64_t) { Step(args).run(); }

// relu6(head(x)), averaged over the positions, hardswish.
void mobile_former_head(const HeadArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t kRun = 64;
  const PlanLinear& head = args.plan->head;
  const int64_t stride = padded(head.inputs), steps = weight_rows(head.inputs);
  const auto* in = static_cast<const Stored*>(args.in);
  float* tile = args.scratch(kRun * 32);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t o = panel * 32, outputs = head.outputs - o < 32 ? head.outputs - o : 32;
    const Weights w{args.weights + head.weight + o * steps, outputs};
    WideSum<float> sums[32 / kLanes<float>];
    for (int64_t p = 0; p < args.pixels; p += kRun) {
      const int64_t count = args.pixels - p < kRun ? args.pixels - p : kRun;
      gemm(count, Rows<Stored>{in + p * stride, stride, 1, head.inputs, 0}, w, tile, outputs,
           AddBiasRelu6{args.weights + head.bias + o});
      for (int64_t v = 0; v * kLanes<float> < outputs; ++v) {
        vec<float> run{};
        for (int64_t i = 0; i < count; ++i) run += load(tile + i * outputs + v * kLanes<float>);
        sums[v].add(run);
      }
    }
    for (int64_t v = 0; v * kLanes<float> < outputs; ++v) {
      double lanes[kLanes<float>];
      sums[v].store_upto(lanes, kLanes<float>);
      float* pooled = args.pooled + o + v * kLanes<float>;
      for (int64_t i = 0; i < kLanes<float>; ++i) pooled[i] = static_cast<float>(lanes[i] / args.pixels);
      store(pooled, hardswish(load(pooled)));
    }
  }
}

void mobile_former_classifier(const ClassifierArgs& args, int64_t begin, int64_t end) {
  const PlanLinear& l = args.linear;
  const int64_t o = begin * 32, until = end * 32 < l.outputs ? end * 32 : l.outputs;
  const Weights w{args.weights + l.weight + o * weight_rows(l.inputs), until - o};
  auto* room = reinterpret_cast<Stored*>(args.scratch(args.batch * padded(l.inputs)));
  const Rows<Stored> rows = as_stored(args.in, args.batch, args.in_stride, l.inputs, room);
  const float* bias = args.weights + l.bias + o;
  if (args.hardswish) {
    gemm(args.batch, rows, w, args.out + o, args.out_stride, AddBiasHardswish{bias});
  } else {
    gemm(args.batch, rows, w, args.out + o, args.out_stride, AddBias{bias});
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
