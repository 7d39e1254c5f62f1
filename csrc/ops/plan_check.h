// Whether a plan is one that can be run: what it says of weights, maps and the state must fit them, so that
// nothing is read or written outside, whatever its numbers are.
#pragma once

#include <stdexcept>
#include <string>

#include "../cpu/engine/deployed_plan.h"

namespace mfk {
namespace {

constexpr int64_t kMostSteps = 4096, kMostMaps = 16, kMostHandedOut = 16;
constexpr int64_t kMostOf = 1 << 20;     // of whatever is counted: products of three stay far from overflow
constexpr int64_t kMostState = 1 << 24;  // floats
constexpr int64_t kMostPairs = 1 << 16;  // of heads and tokens
constexpr int64_t kMostWindow = 64;
constexpr int64_t kMostRounded = 1 << 16;   // inputs of an int8 matrix: their sum fits 32 bits
constexpr int64_t kMostProducts = 1 << 14;  // that are calibrated
constexpr int64_t kMostKernel = 15;         // rows and columns of a dense convolution
constexpr int64_t kMostDepthwise = 255;     // of a depthwise one
constexpr int64_t kMostStride = 255;
constexpr int64_t kMostPixels = 1LL << 33;  // of a map

// In the order of PlanKind.
constexpr const char* kKindNames[] = {
    "image_conv", "dense_conv", "pointwise",    "depthwise", "inverted", "attention", "split",
    "join",       "lite",       "block",        "down",      "add",      "map_norm",  "weigh",
    "resize",     "state_rows", "dynamic_lite", "spread",    "max_pool", "copy",      "linear",
    "norm",       "attend",     "combine",      "gate",      "slopes",   "kernels",   "mix",
    "affine",     "pool",       "pooled",       "collect",   "turn",     "hand_out"};

inline const PlanLayer* layers_of(const Plan& plan) { return reinterpret_cast<const PlanLayer*>(&plan + 1); }
inline const PlanStep* first_step(const Plan& plan) {
  return reinterpret_cast<const PlanStep*>(layers_of(plan) + plan.linears);
}
inline const PlanStep* next_step(const PlanStep* step) {
  return reinterpret_cast<const PlanStep*>(reinterpret_cast<const int64_t*>(step + 1) + step->words);
}
template <class T>
const T& fields_of(const PlanStep* step) {
  return *reinterpret_cast<const T*>(step + 1);
}

// Throws where something of a plan, or of one of its steps, does not fit.
inline void need_of_plan(bool fits, const std::string& where, const char* what) {
  if (!fits) throw std::runtime_error("deploy: plan: " + where + " " + what + "; deploy the network again");
}
inline void need_of_step(bool fits, int64_t number, int64_t kind, const char* what) {
  if (fits) return;
  const bool known = kind >= 0 && kind <= kHandOut;
  const std::string name = known ? kKindNames[kind] : std::to_string(kind);
  need_of_plan(false, "step " + std::to_string(number) + " (" + name + "):", what);
}
// Throws where an image does not fit a step of a plan that is in order.
inline void need_of_image(bool fits, int64_t number, int64_t kind, const std::string& what) {
  if (fits) return;
  throw std::runtime_error("deploy: x has a size that this network cannot take: step " +
                           std::to_string(number) + " (" + kKindNames[kind] + ") " + what);
}

class PlanCheck {
 public:
  // Throws, naming the step, where `count` words are no plan for so many weights and classes.
  static void run(const int64_t* words, int64_t count, int64_t weights, int64_t classes) {
    constexpr int64_t header = sizeof(Plan) / 8;
    need(count >= header, "the header", "is not there");
    PlanCheck(*reinterpret_cast<const Plan*>(words), weights).all(count - header, classes);
  }

 private:
  PlanCheck(const Plan& plan, int64_t weights) : plan_(plan), weights_(weights) {}

  static void need(bool fits, const char* where, const char* what) {
    if (!fits) need_of_plan(false, where, what);
  }
  // Of the step that is being looked at.
  void need(bool fits, const char* what) const { need_of_step(fits, number_, kind_, what); }
  void in_range(int64_t value, int64_t least, int64_t most, const char* what) const {
    need(value >= least && value <= most, what);
  }
  void count(int64_t value, const char* what) const { in_range(value, 1, kMostOf, what); }
  void flag(int64_t value, const char* what) const { in_range(value, 0, 1, what); }

  void in_weights(int64_t offset, int64_t floats) const {
    need(floats <= weights_ && offset >= 0 && offset <= weights_ - floats, "reads beyond the weights");
  }
  void in_state(int64_t place, int64_t floats) const {
    need(floats <= plan_.state && place >= 0 && place <= plan_.state - floats, "leaves the state");
  }
  void in_state(int64_t place, int64_t rows, int64_t stride, int64_t width) const {
    count(rows, "has a wrong number of rows");
    in_range(stride, 0, kMostOf, "has a wrong stride");
    count(width, "has a wrong width");
    in_state(place, (rows - 1) * stride + width);
  }
  // Floats of a matrix whose inputs are in runs of so many: in bfloat16 they go in pairs, in int8 in fours,
  // and two rows follow.
  int64_t matrix_size(const PlanLinear& l, int64_t inputs, int64_t run, int64_t outputs) const {
    if (l.scale != 0) return (inputs / run * blocks_of(run, 4) + 2) * outputs;
    return (plan_.bf16 ? inputs / run * blocks_of(run, 2) : inputs) * outputs;
  }
  // How inputs are rounded, or the number of a product in a calibration.
  void rounding(const PlanLinear& l, bool may_be) const {
    const float scale = float_from_bits(l.scale);
    const bool rounds = l.scale >> 32 == 0 && scale > 0 && scale < __FLT_MAX__ && l.zero >= 0 &&
                        l.zero <= 255 && l.inputs <= kMostRounded;
    const bool numbered = l.scale == 0 && l.zero >= 0 && l.zero <= kMostProducts;
    const bool neither = l.scale == 0 && l.zero == 0;
    need(neither || (plan_.int8 && may_be && (rounds || numbered)), "rounds its inputs in a way it may not");
  }
  void matrix_shape(const PlanLinear& l, int64_t inputs, int64_t outputs) const {
    need(l.inputs == inputs && l.inputs >= 1 && l.inputs <= kMostOf, "has a matrix of other inputs");
    count(outputs, "has a wrong number of outputs");
    need(l.outputs == padded(outputs), "has a matrix of other outputs");
  }
  void linear(const PlanLinear& l, int64_t inputs, int64_t outputs, int64_t run = 0,
              bool may_round = true) const {
    matrix_shape(l, inputs, outputs);
    rounding(l, may_round);
    in_weights(l.weight, matrix_size(l, inputs, run > 0 ? run : inputs, l.outputs));
    in_weights(l.bias, l.outputs);
  }
  void exact_linear(const PlanLinear& l, int64_t inputs, int64_t outputs, int64_t run = 0) const {
    linear(l, inputs, outputs, run, false);
  }

  // One of a layer over rows of the state, whose weights may be narrow: then it has a factor of each output.
  void row_linear(const PlanLinear& l, int64_t inputs, int64_t outputs) const {
    if (plan_.narrow == 0) return exact_linear(l, inputs, outputs);
    matrix_shape(l, inputs, outputs);
    rounding(l, false);
    in_weights(l.weight, l.inputs * l.outputs * plan_.narrow / 4);
    in_weights(l.bias, 2 * l.outputs);
  }

  void all(int64_t left, int64_t classes) {
    if (plan_.weights != weights_) {
      throw std::runtime_error("deploy: weights must be " + std::to_string(plan_.weights) +
                               " floats, those of the plan, got " + std::to_string(weights_));
    }
    need(plan_.bf16 == 0 || plan_.bf16 == 1, "bf16", "is neither 0 nor 1");
    need(plan_.narrow >= 0 && plan_.narrow <= (plan_.bf16 ? 0 : 2), "narrow",
         "is neither 0 nor the bytes of int8 or bfloat16, or not 0 in a network in bfloat16");
    need(plan_.int8 == 0 || (plan_.int8 == 1 && plan_.bf16 == 0), "int8",
         "is neither 0 nor 1, or not 0 in a network in bfloat16");
    need(plan_.in_channels >= 1 && plan_.in_channels <= kMostOf, "in_channels", "are none, or too many");
    need(plan_.maps >= 1 && plan_.maps <= kMostMaps, "maps", "are none, or too many");
    need(plan_.state >= 0 && plan_.state <= kMostState, "state", "is too large");
    need(plan_.steps >= 1 && plan_.steps <= kMostSteps, "steps", "are none, or too many");
    constexpr int64_t layer = sizeof(PlanLayer) / 8;
    need(plan_.linears >= 0 && plan_.linears <= left / layer && (plan_.linears > 0) == (classes > 0),
         "linears", "are too many, or do not go with the classes");
    left -= plan_.linears * layer;
    const PlanStep* at = first_step(plan_);
    for (number_ = 0; number_ < plan_.steps; ++number_) {
      kind_ = -1;
      constexpr int64_t head = sizeof(PlanStep) / 8;
      need(left >= head, "is not there");
      kind_ = at->kind;
      left -= head;
      need(at->behind >= 0 && at->behind <= plan_.weights, "has later steps' weights outside of the weights");
      need(at->words >= 0 && at->words <= left, "has more words than there are");
      left -= at->words;
      step(at);
      at = next_step(at);
    }
    need(left == 0, "words", "follow the last step");
    need((handed_out_ > 0) == (classes == 0) && handed_out_ <= kMostHandedOut, "results",
         "are none, or too many");
    head(classes);
  }

  void head(int64_t classes) {
    kind_ = kLinear;
    for (int64_t i = 0; i < plan_.linears; ++i) {
      const auto& [activation, l] = layers_of(plan_)[i];
      activated(activation);
      count(l.outputs, "has a wrong number of outputs");
      row_linear(l, l.inputs, l.outputs);
      if (i == 0) {
        in_state(plan_.features, padded(l.inputs));
      } else {
        need(padded(l.inputs) <= layers_of(plan_)[i - 1].linear.outputs, "has too many inputs");
      }
    }
    if (classes > 0)
      need(layers_of(plan_)[plan_.linears - 1].linear.outputs >= classes, "has too few outputs");
  }

  template <class T>
  const T& fields(const PlanStep* step) const {
    need(step->words == sizeof(T) / 8, "has another number of words");
    return fields_of<T>(step);
  }

  // --- steps that write a map ----------------------------------------------------------------------------

  void read(int64_t map, int64_t channels) const {
    need(map >= 0 && map < plan_.maps && channels >= 1 && channels_[map] == channels,
         "reads a map that is not there, or of other channels");
  }
  void out(const MapOut& made, int64_t input) {
    need(made.map >= 0 && made.map < plan_.maps && made.map != input, "writes a map that it may not");
    count(made.channels, "has a wrong number of channels");
    in_range(made.sums, 0, 2, "has wrong sums");
    const bool bridged = made.heads != 0;
    if (bridged) {
      need(made.heads >= 1 && made.heads <= made.channels && made.channels % made.heads == 0,
           "has a wrong number of heads");
      need(made.tokens >= 1 && made.tokens <= kMostPairs / made.heads, "has a wrong number of tokens");
    }
    const int64_t columns = padded(made.channels);
    need(bridged == (made.scatter >= 0 || made.gather >= 0),
         "has heads without a bridge, or a bridge without");
    if (made.scatter >= 0) in_state(made.scatter, made.tokens, made.row, 2 * columns);
    if (made.gather >= 0) in_state(made.gather, made.tokens, made.row, columns);
    channels_[made.map] = made.channels;
    last_ = &made;
  }
  // An activation of the map that a step makes.
  template <class Step>
  void activated(const Step& s) const {
    if (s.activation == kDynamicRelu || s.activation == kScaledRelu6) {
      count(s.out.channels, "has a wrong number of channels");
      attends(s.attention, s.tokens, s.out.map);
      return in_state(s.slopes, 2 * padded(s.out.channels) * slope_rows(s));
    }
    need(s.slopes == -1 && s.attention == -1, "has slopes without an activation that takes them");
    activated(s.activation);
  }
  void activated(int64_t activation) const {
    need((activation >= kNoActivation && activation <= kRelu6) || activation == kSilu,
         "has an unknown activation");
  }
  // Slopes that may be mixed: as many rows as tokens.
  template <class Step>
  static int64_t slope_rows(const Step& s) {
    return s.attention == -1 ? 1 : s.tokens;
  }
  // Slopes are mixed in rows that lie in memory as floats.
  template <class Step>
  void not_rounded_where_mixed(const Step& s, const PlanLinear& l) const {
    need(s.attention == -1 || l.scale == 0, "rounds its inputs in a way it may not");
  }
  void both_round(const PlanLinear& one, const PlanLinear& other) const {
    need((one.scale != 0) == (other.scale != 0), "rounds the inputs of one product alone");
  }
  void attends(int64_t attention, int64_t tokens, int64_t made) const {
    if (attention == -1) return;
    count(tokens, "has a wrong number of tokens");
    read(attention, attention_channels(tokens, plan_.bf16));
    need(attention != made, "writes a map that it may not");
  }
  // (kernel, kernel, channels), and somewhere the bias.
  void taps(int64_t kernel, int64_t channels, int64_t offset, int64_t bias) const {
    in_weights(offset, kernel * kernel * channels);
    in_weights(bias, channels);
  }
  // 3x3, and the bias behind it.
  void taps(int64_t channels, int64_t offset) const { in_weights(offset, 10 * channels); }
  // What a step reads for a pixel; some of it lies in the map, whatever its size is.
  template <class Step>
  void window(const Step& s, int64_t most) const {
    in_range(s.kernel, 1, most, "has a wrong kernel");
    in_range(s.stride, 1, kMostStride, "has a wrong stride");
    in_range(s.padding, kSamePadding, s.kernel / 2, "has a wrong padding");
  }

  void conv(const ConvStep& s, bool image) {
    if (image) {
      need(s.input == -1 && s.in_channels == plan_.in_channels, "does not read the image");
    } else {
      read(s.input, s.in_channels);
    }
    window(s, kMostKernel);
    activated(s.activation);
    count(s.out.channels, "has a wrong number of channels");
    const int64_t taps = s.kernel * s.kernel, inputs = taps * s.in_channels;
    if (s.groups == 1) {
      linear(s.linear, inputs, s.out.channels, image ? s.kernel * s.in_channels : 0, !image);
    } else {
      need(!image, "has wrong groups");
      in_groups(s);
      matrix_shape(s.linear, inputs, s.out.channels);
      rounding(s.linear, true);
      in_weights(s.linear.weight, grouped_size(s, taps));
      in_weights(s.linear.bias, s.linear.outputs);
    }
    out(s.out, s.input);
  }
  void pointwise(const PointwiseStep& s) {
    read(s.input, s.in_channels);
    count(s.out.channels, "has a wrong number of channels");
    if (s.affine != -1) in_state(s.affine, 2 * padded(s.in_channels));
    flag(s.affine_gelu, "has a wrong affine_gelu");
    flag(s.mixed, "has a wrong mixed");
    activated(s);
    if (s.added != -1) {
      read(s.added, s.out.channels);
      need(s.activation == kNoActivation, "has an activation of a sum");
    }
    const int64_t inputs = s.in_channels, outputs = s.out.channels;
    need(s.linear.inputs == inputs && s.linear.outputs == padded(outputs), "has another matrix");
    in_groups(s);
    rounding(s.linear, s.mixed == 0);
    const int64_t size =
        s.groups == 1 ? matrix_size(s.linear, inputs, inputs, padded(outputs)) : grouped_size(s, 1);
    s.mixed ? in_state(s.linear.weight, size) : in_weights(s.linear.weight, size);
    in_weights(s.linear.bias, padded(outputs));
    out(s.out, s.input);
  }
  template <class Step>
  void in_groups(const Step& s) const {
    need(s.groups >= 1 && s.in_channels % s.groups == 0 && s.out.channels % s.groups == 0,
         "has wrong groups");
  }
  // See gemm_groups; `taps`: runs of inputs.
  template <class Step>
  int64_t grouped_size(const Step& s, int64_t taps) const {
    const int64_t outputs = s.out.channels, group_in = s.in_channels / s.groups,
                  group_out = outputs / s.groups;
    int64_t size = 0;
    for (int64_t o = 0; o < outputs; o += 16) {
      const int64_t end = o + 15 < outputs ? o + 15 : outputs - 1;
      const int64_t inputs = (end / group_out - o / group_out + 1) * group_in;
      size += matrix_size(s.linear, taps * inputs, inputs, 16);
    }
    return size;
  }
  void depthwise(const DepthwiseStep& s) {
    read(s.input, s.in_channels);
    window(s, kMostDepthwise);
    activated(s);
    flag(s.mixed, "has a wrong mixed");
    count(s.out.channels, "has a wrong number of channels");
    const int64_t inputs = padded(s.in_channels), channels = padded(s.out.channels);
    need(s.in_channels == s.out.channels || s.out.channels % inputs == 0, "has a wrong number of channels");
    const int64_t size = s.kernel * s.kernel * channels;
    s.mixed ? in_state(s.taps, size) : in_weights(s.taps, size);
    in_weights(s.bias, channels);
    out(s.out, s.input);
  }
  void inverted(const InvertedStep& s) {
    const int64_t channels = s.out.channels;
    read(s.input, channels);
    if (s.kernel != 0) {
      need(s.kernel >= 1 && s.kernel <= kMostDepthwise && s.kernel % 2 == 1, "has a wrong kernel");
      taps(s.kernel, padded(channels), s.taps, s.bias);
    }
    count(s.expand.outputs, "has a wrong number of channels");
    linear(s.expand, channels, s.expand.outputs);
    need(s.project.inputs <= s.expand.outputs, "has another matrix");
    linear(s.project, s.project.inputs, channels);
    both_round(s.expand, s.project);
    out(s.out, s.input);
  }
  void attention(const AttentionStep& s) {
    count(s.heads, "has a wrong number of heads");
    count(s.depth, "has a wrong depth");
    count(s.channels, "has a wrong number of channels");
    in_range(s.gating, kUngated, kSiluGate, "has an unknown gating");
    read(s.input, attention_pixel(s));
    need(s.out.channels == attention_result(s), "has a wrong number of channels");
    flag(s.outside, "has a wrong outside");
    need(s.out.sums == 0 && s.out.heads == 0, "has sums, or a bridge");
    out(s.out, s.input);
  }
  void windows(const WindowsStep& s) {
    read(s.input, s.out.channels);
    in_range(s.window, 1, kMostWindow, "has a wrong window");
    out(s.out, s.input);
  }

  // A depthwise convolution that multiplies channels, and the matrix of what it leaves.
  void multiplied(int64_t channels, int64_t hidden, int64_t offset, const PlanLinear& l,
                  int64_t outputs) const {
    const int64_t width = padded(channels);
    count(hidden, "has a wrong number of channels");
    need(hidden % width == 0, "has a wrong number of channels");
    taps(hidden, offset);
    linear(l, hidden / width * channels, outputs, channels);
  }
  void residual(int64_t added, int64_t in_channels, const MapOut& made, int64_t stride) const {
    flag(added, "has a wrong residual");
    in_range(stride, 1, 2, "has a wrong stride");
    need(!added || (in_channels == made.channels && stride == 1), "adds an input of another shape");
  }
  void lite(const LiteStep& s) {
    read(s.input, s.in_channels);
    residual(s.residual, s.in_channels, s.out, s.stride);
    multiplied(s.in_channels, s.hidden, s.taps, s.project, s.out.channels);
    out(s.out, s.input);
  }
  void block(const BlockStep& s) {
    read(s.input, s.in_channels);
    residual(s.residual, s.in_channels, s.out, 1);
    count(s.hidden, "has a wrong number of channels");
    linear(s.expand, s.in_channels, s.hidden);
    need(s.hidden % 16 == 0 && s.project.inputs <= s.hidden, "has a wrong number of channels");
    taps(s.hidden, s.taps);
    attends(s.attention, s.tokens, s.out.map);
    in_state(s.slopes1, 2 * s.hidden * slope_rows(s));
    in_state(s.slopes2, 2 * s.hidden * slope_rows(s));
    linear(s.project, s.project.inputs, s.out.channels);
    both_round(s.expand, s.project);
    not_rounded_where_mixed(s, s.project);
    out(s.out, s.input);
  }
  void down(const DownStep& s) {
    read(s.input, s.in_channels);
    in_range(s.stride, 1, 2, "has a wrong stride");
    count(s.out.channels, "has a wrong number of channels");
    multiplied(s.in_channels, s.hidden1, s.taps1, s.project1, s.out.channels);
    multiplied(s.out.channels, s.hidden2, s.taps2, s.project2, s.out.channels);
    attends(s.attention, s.tokens, s.out.map);
    both_round(s.project1, s.project2);
    not_rounded_where_mixed(s, s.project1);
    in_state(s.slopes1, 2 * s.hidden1 * slope_rows(s));
    in_state(s.slopes2, 2 * s.hidden2 * slope_rows(s));
    out(s.out, s.input);
  }

  void add(const AddStep& s) {
    read(s.input, s.out.channels);
    read(s.added, s.out.channels);
    flag(s.maximum, "has a wrong maximum");
    activated(s.activation);
    out(s.out, s.input);
  }
  void max_pool(const MaxPoolStep& s) {
    read(s.input, s.out.channels);
    window(s, kMostKernel);
    out(s.out, s.input);
  }
  void map_norm(const MapNormStep& s) {
    read(s.input, s.out.channels);
    in_weights(s.gamma, padded(s.out.channels));
    in_weights(s.beta, padded(s.out.channels));
    out(s.out, s.input);
  }
  void weigh(const WeighStep& s) {
    read(s.input, s.in_channels);
    in_range(s.stride, 1, kMostStride, "has a wrong stride");
    count(s.heads, "has a wrong number of heads");
    in_range(s.tokens, 1, kMostPairs, "has a wrong number of tokens");
    in_state(s.queries, s.tokens, s.row, padded(s.in_channels));
    need(s.out.channels == attention_channels(s.tokens, plan_.bf16), "has a wrong number of channels");
    need(s.out.sums == 0 && s.out.heads == 0, "has sums, or a bridge");
    out(s.out, s.input);
  }

  void resize(const ResizeStep& s) {
    read(s.input, s.out.channels);
    in_range(s.like, kHalfTheSize, kMostMaps - 1, "has an unknown size");
    if (s.like >= 0)
      need(s.like < plan_.maps && channels_[s.like] > 0, "has the size of a map that is not there");
    if (s.added != -1) {
      read(s.added, s.out.channels);
      need(s.added != s.out.map, "writes a map that it may not");
    }
    in_range(s.resampling, kNearest, kBilinearByTwo, "has an unknown resampling");
    out(s.out, s.input);
  }
  void state_rows(const StateRowsStep& s) {
    need(s.input == -1, "reads a map");
    count(s.out.channels, "has a wrong number of channels");
    in_state(s.source, s.rows, s.stride, padded(s.out.channels));
    out(s.out, s.input);
  }
  void dynamic_lite(const DynamicLiteStep& s) {
    read(s.input, s.in_channels);
    residual(1, s.in_channels, s.out, 1);
    multiplied(s.in_channels, s.hidden, s.taps, s.project, s.out.channels);
    need(s.project.scale == 0, "rounds its inputs in a way it may not");
    in_state(s.slopes, 2 * s.hidden);
    out(s.out, s.input);
  }
  void spread(const SpreadStep& s) {
    read(s.input, s.out.channels);
    in_range(s.tokens, 1, kMostPairs, "has a wrong number of tokens");
    in_state(s.values, s.tokens, s.row, padded(s.out.channels));
    count(s.positions, "has a wrong number of positions");
    in_weights(s.weights, s.positions * s.tokens);
    in_weights(s.bias, s.positions);
    out(s.out, s.input);
  }

  // --- steps that write the state ------------------------------------------------------------------------

  void copy(const CopyStep& s) const {
    flag(s.weights, "has wrong weights");
    count(s.floats, "has a wrong number of floats");
    s.weights ? in_weights(s.source, s.floats) : in_state(s.source, s.floats);
    in_state(s.target, s.floats);
  }
  void linear_step(const LinearStep& s) const {
    count(s.linear.inputs, "has a wrong number of inputs");
    count(s.linear.outputs, "has a wrong number of outputs");
    in_state(s.source, s.rows, s.source_stride, padded(s.linear.inputs));
    in_state(s.target, s.rows, s.target_stride, s.linear.outputs);
    flag(s.added, "has a wrong added");
    const bool known = s.activation == kGelu || s.activation == kRelu || s.activation == kRelu6 ||
                       s.activation == kHardsigmoid || s.activation == kSilu || s.activation == kSigmoid;
    need(s.activation == kNoActivation || (known && !s.added), "has an unknown activation");
    row_linear(s.linear, s.linear.inputs, s.linear.outputs);
  }
  void norm(const NormStep& s) const {
    count(s.width, "has a wrong width");
    const int64_t width = padded(s.width);
    in_state(s.source, s.rows, width, width);
    in_state(s.target, s.rows, width, width);
    in_weights(s.gamma, 2 * width);
  }
  void attend(const AttendStep& s) const {
    count(s.heads, "has a wrong number of heads");
    count(s.depth, "has a wrong depth");
    for (int64_t place : {s.queries, s.keys, s.values}) in_state(place, s.rows, s.stride, s.heads * s.depth);
    need(s.target_stride >= s.heads * s.depth, "has a wrong stride");
    in_state(s.target, s.rows, s.target_stride, s.target_stride);
  }
  void combine(const CombineStep& s) const {
    need(last_ != nullptr && last_->gather >= 0 && last_->tokens == s.tokens && last_->heads == s.heads &&
             last_->channels == s.channels,
         "reads what no map's step gathered");
    in_state(s.target, s.tokens, padded(s.channels), padded(s.channels));
  }
  void gate(const GateStep& s) const {
    count(s.channels, "has a wrong number of channels");
    in_state(s.at, s.rows, s.at_stride, padded(s.channels));
    in_state(s.gates, s.rows, s.stride, padded(s.channels));
  }
  void slopes(const SlopesStep& s) const {
    count(s.linear.inputs, "has a wrong number of inputs");
    count(s.linear.outputs, "has a wrong number of outputs");
    in_range(s.functions, 1, 2, "has a wrong number of functions");
    need(s.linear.outputs % (16 * s.functions) == 0, "has a wrong number of outputs");
    const int64_t row = 2 * s.linear.outputs / s.functions;
    in_state(s.source, s.rows, s.source_stride, padded(s.linear.inputs));
    in_state(s.target, s.rows, row, row);
    row_linear(s.linear, s.linear.inputs, s.linear.outputs);
  }
  // Steps that read sums of the last map.
  void summed(int64_t channels, int64_t sums) const {
    need(last_ != nullptr && last_->sums >= sums && last_->channels == channels,
         "reads sums that no map's step made");
  }
  void kernels(const KernelsStep& s) const {
    summed(s.channels, 1);
    count(s.token_dim, "has a wrong token_dim");
    in_state(s.token, padded(s.token_dim));
    count(s.hidden.outputs, "has a wrong number of channels");
    row_linear(s.hidden, padded(s.token_dim) + padded(s.channels), s.hidden.outputs);
    need(s.scores.inputs <= s.hidden.outputs, "has another matrix");
    flag(s.softmax, "has a wrong softmax");
    count(s.kernels, "has a wrong number of kernels");
    row_linear(s.scores, s.scores.inputs, s.kernels);
    in_state(s.target, s.scores.outputs);
  }
  void mix(const MixStep& s) const {
    count(s.kernels, "has a wrong number of kernels");
    count(s.blocks, "has a wrong number of blocks");
    flag(s.matrix, "has a wrong matrix");
    const int64_t of_float = plan_.bf16 && s.matrix ? 2 : 1;
    in_state(s.attention, s.kernels);
    in_weights(s.source, s.blocks * 16 * (s.kernels + 1) / of_float);
    in_state(s.target, s.blocks * 16 / of_float);
  }
  void affine(const AffineStep& s) const {
    summed(s.channels, 2);
    in_range(s.norm, kGroupNorm, kResponseNormOfChannels, "has an unknown norm");
    in_weights(s.gamma, s.channels);
    in_weights(s.beta, s.channels);
    in_state(s.target, 2 * padded(s.channels));
  }
  void pooled(const PooledStep& s) const {
    read(s.input, s.in_channels);
    count(s.linear.outputs, "has a wrong number of outputs");
    exact_linear(s.linear, s.in_channels, s.linear.outputs);
    in_state(s.target, s.linear.outputs);
    if (s.slopes != -1) in_state(s.slopes, 2 * s.linear.outputs);
  }

  void collect(const CollectStep& s) const {
    read(s.input, s.in_channels);
    in_range(s.tokens, 1, kMostPairs, "has a wrong number of tokens");
    flag(s.added, "has a wrong added");
    in_state(s.target, s.tokens * padded(s.in_channels));
    count(s.positions, "has a wrong number of positions");
    in_weights(s.weights, s.positions * weights_of_position(s.tokens));
    in_weights(s.bias, s.tokens);
  }
  void turn(const TurnStep& s) const {
    in_state(s.source, s.rows, s.source_stride, s.columns);
    flag(s.added, "has a wrong added");
    in_state(s.target, s.columns * padded(s.rows));
  }

  void step(const PlanStep* at) {
    switch (at->kind) {
      case kImageConv:
      case kDenseConv:
        return conv(fields<ConvStep>(at), at->kind == kImageConv);
      case kPointwise:
        return pointwise(fields<PointwiseStep>(at));
      case kDepthwise:
        return depthwise(fields<DepthwiseStep>(at));
      case kInverted:
        return inverted(fields<InvertedStep>(at));
      case kAttention:
        return attention(fields<AttentionStep>(at));
      case kSplit:
      case kJoin:
        return windows(fields<WindowsStep>(at));
      case kLite:
        return lite(fields<LiteStep>(at));
      case kBlock:
        return block(fields<BlockStep>(at));
      case kDown:
        return down(fields<DownStep>(at));
      case kAdd:
        return add(fields<AddStep>(at));
      case kMaxPool:
        return max_pool(fields<MaxPoolStep>(at));
      case kMapNorm:
        return map_norm(fields<MapNormStep>(at));
      case kWeigh:
        return weigh(fields<WeighStep>(at));
      case kResize:
        return resize(fields<ResizeStep>(at));
      case kStateRows:
        return state_rows(fields<StateRowsStep>(at));
      case kDynamicLite:
        return dynamic_lite(fields<DynamicLiteStep>(at));
      case kSpread:
        return spread(fields<SpreadStep>(at));
      case kCopy:
        return copy(fields<CopyStep>(at));
      case kLinear:
        return linear_step(fields<LinearStep>(at));
      case kNorm:
        return norm(fields<NormStep>(at));
      case kAttend:
        return attend(fields<AttendStep>(at));
      case kCombine:
        return combine(fields<CombineStep>(at));
      case kGate:
        return gate(fields<GateStep>(at));
      case kSlopes:
        return slopes(fields<SlopesStep>(at));
      case kKernels:
        return kernels(fields<KernelsStep>(at));
      case kMix:
        return mix(fields<MixStep>(at));
      case kAffine:
        return affine(fields<AffineStep>(at));
      case kPool: {
        const auto& s = fields<PoolStep>(at);
        summed(s.channels, 1);
        return in_state(s.target, padded(s.channels));
      }
      case kPooled:
        return pooled(fields<PooledStep>(at));
      case kCollect:
        return collect(fields<CollectStep>(at));
      case kTurn:
        return turn(fields<TurnStep>(at));
      case kHandOut: {
        const auto& s = fields<HandOutStep>(at);
        read(s.map, s.channels);
        ++handed_out_;
        return;
      }
      default:
        need(false, "is of an unknown kind");
    }
  }

  const Plan& plan_;
  const int64_t weights_;
  int64_t channels_[kMostMaps] = {};  // of each map, 0 where nothing has been written
  const MapOut* last_ = nullptr;
  int64_t number_ = 0, kind_ = -1, handed_out_ = 0;
};

}  // namespace
}  // namespace mfk
