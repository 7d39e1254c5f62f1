#include "deployed_mobile_former.h"
#include "tokens.h"

namespace mfk {
namespace MFK_ISA {
namespace {

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

  void normalise(float* x, int64_t norm) const { layer_norm(x, tokens, width, stride, weights + norm); }

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

  void former(float* a, float* b) const {
    float* x = args.state.tokens;
    linear(plan.former_query, tokens, x, stride, a, stride, AddBias{bias(plan.former_query)});
    // Keys and values are the tokens themselves.
    const int64_t count = args.plan->former_heads;
    attend({a, stride}, {x, stride}, {x, stride}, tokens, count, width / count, b, stride, args.scratch(0));
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
      combine_records(args.gathered, args.records, record_size(*args.plan, plan.bridge_channels), heads,
                      tokens, plan.bridge_channels, a, reinterpret_cast<double*>(args.scratch(0)));
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

}  // namespace MFK_ISA
}  // namespace mfk
