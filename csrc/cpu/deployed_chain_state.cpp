#include "deployed_chain.h"
#include "tokens.h"

namespace mfk {
namespace MFK_ISA {
namespace {

MFK_INLINE double from_bits(int64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

struct State {
  const ChainArgs& args;

  const float* at(int64_t offset) const { return args.weights + offset; }
  float* place(int64_t offset) const { return args.state + offset; }

  // `room` holds rows as wide as the inputs.
  template <class Epilogue>
  void linear(const PlanLinear& l, int64_t rows, const float* in, int64_t in_stride, float* out,
              int64_t out_stride, float* room, Epilogue epilogue) const {
    gemm(rows, as_stored(in, rows, in_stride, l.inputs, reinterpret_cast<Stored*>(room)),
         Weights{at(l.weight), l.outputs}, out, out_stride, epilogue);
  }

  // Sum i of channel c over the last step's map: 0 of values, 1 of squares.
  double sum(int64_t i, int64_t c) const {
    const int64_t record = chain_record_size(*args.last), width = padded(args.last->channels);
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

  void tokens(const ChainTokens& step) const {
    const int64_t count = step.tokens, stride = padded(step.dim);
    const int64_t columns = step.bridge_channels > 0 ? padded(step.bridge_channels) : 0;
    int64_t widest = columns > 3 * stride ? columns : 3 * stride;
    if (step.former) widest = step.expand.outputs > widest ? step.expand.outputs : widest;
    float* a = args.scratch(2 * columns + 16 + 3 * count * widest);
    float *b = a + count * widest, *room = b + count * widest, *front = room + count * widest;
    float* x = place(step.at);
    if (step.first >= 0) memcpy(x, at(step.first), count * stride * sizeof(float));
    if (step.bridge_channels > 0) {
      combine_records(args.records, args.tasks, chain_record_size(*args.last), step.bridge_heads, count,
                      step.bridge_channels, a, reinterpret_cast<double*>(front));
      linear(step.bridge, count, a, columns, x, stride, room,
             AddResidual<float>{at(step.bridge.bias), x, stride});
    }
    if (step.former) {
      memcpy(a, x, count * stride * sizeof(float));
      layer_norm(a, count, step.dim, stride, at(step.norm1));
      linear(step.qkv, count, a, stride, b, 3 * stride, room, AddBias{at(step.qkv.bias)});
      memset(a, 0, count * stride * sizeof(float));
      float* logits = room;
      attend({b, 3 * stride}, {b + stride, 3 * stride}, {b + 2 * stride, 3 * stride}, count, step.heads,
             step.dim / step.heads, a, stride, logits);
      linear(step.project, count, a, stride, x, stride, room,
             AddResidual<float>{at(step.project.bias), x, stride});
      memcpy(a, x, count * stride * sizeof(float));
      layer_norm(a, count, step.dim, stride, at(step.norm2));
      const int64_t hidden = step.expand.outputs;
      linear(step.expand, count, a, stride, b, hidden, room, AddBiasGelu{at(step.expand.bias)});
      linear(step.shrink, count, b, hidden, x, stride, room,
             AddResidual<float>{at(step.shrink.bias), x, stride});
    }
    if (step.keep >= 0) memcpy(place(step.keep), x, stride * sizeof(float));
    if (step.norm >= 0) {
      layer_norm(x, count, step.dim, stride, at(step.norm));
      linear(step.query, count, x, stride, place(step.queries), step.query.outputs, room,
             AddBias{at(step.query.bias)});
    }
  }

  void kernels(const ChainKernels& step) const {
    const int64_t width = padded(step.token_dim), inputs = width + padded(step.channels);
    const int64_t hidden = step.hidden.outputs;
    float* in = args.scratch(2 * inputs + 2 * hidden + 16);
    float *middle = in + inputs, *room = middle + hidden, *to = place(step.to);
    memcpy(in, place(step.token), width * sizeof(float));
    means(step.channels, in + width);
    linear(step.hidden, 1, in, inputs, middle, hidden, room, AddBiasRelu{at(step.hidden.bias)});
    linear(step.scores, 1, middle, hidden, to, 0, room, AddBias{at(step.scores.bias)});
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
  void mix(const ChainMix& step, int64_t begin, int64_t end) const {
    constexpr int64_t n = kLanes<float>;
    const float* attention = place(step.attention);
    const T* from = reinterpret_cast<const T*>(at(step.from));
    T* to = reinterpret_cast<T*>(place(step.to));
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

  void affine(const ChainAffine& step) const {
    const int64_t channels = step.channels, width = padded(channels);
    const float *gamma = at(step.gamma), *beta = at(step.beta);
    float *factor = place(step.to), *summand = factor + width;
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

void chain_state(const ChainArgs& args, int64_t begin, int64_t end) {
  const State state{args};
  const auto* fields = args.fields;
  switch (args.kind) {
    case kTokens:
      return state.tokens(*reinterpret_cast<const ChainTokens*>(fields));
    case kKernels:
      return state.kernels(*reinterpret_cast<const ChainKernels*>(fields));
    case kMix: {
      const auto& step = *reinterpret_cast<const ChainMix*>(fields);
      return step.matrix ? state.mix<Stored>(step, begin, end) : state.mix<float>(step, begin, end);
    }
    case kAffine:
      return state.affine(*reinterpret_cast<const ChainAffine*>(fields));
    default: {
      const auto& step = *reinterpret_cast<const ChainPool*>(fields);
      state.means(step.channels, args.state + step.to);
    }
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
