// The plan of a deployed network: a list of 64-bit integers, a Plan, its linear layers, then its steps, each
// a PlanStep and the struct of its kind. mfkernels/deploy/cpu/steps.py has the same structs, field by field.
//
// Steps work on a few feature maps, which they name by numbers, and on a state of floats, in which they name
// places. Feature maps are channels last; their channels are padded to a multiple of 16, and what the padding
// holds is zero. They are float, or bfloat16. Rows of the state are padded likewise. Offsets count floats
// from the start of the weights.
//
// In a plan with narrow weights, maps are float, and the matrices of linear layers, which are those of steps
// over the state and of the Plan itself, are narrow: behind the bias lies a factor of each output.
#pragma once

#include "deployed.h"
#include "images.h"

namespace mfk {

struct Plan {
  int64_t weights;  // floats
  int64_t bf16;     // 0 or 1: matrices and maps in bfloat16, all else in float
  int64_t narrow;   // bytes of a narrow weight: 1 (int8) or 2 (bfloat16); 0 where there are none
  int64_t int8;     // 0 or 1: matrices of steps over maps may be int8, or are calibrated
  int64_t in_channels;
  int64_t maps, state;     // how many maps; floats of the state
  int64_t features;        // the place of the first linear layer's inputs
  int64_t linears, steps;  // linears: 0 where maps are the results
  // PlanLayer layer[linears], then the steps
};
struct PlanLayer {
  int64_t activation;
  PlanLinear linear;
};
struct PlanStep {
  int64_t kind, words;  // words: of the struct that follows
  int64_t behind;       // the offset from which on weights are those of later steps
};

enum PlanKind : int64_t {
  // write a map
  kImageConv,
  kDenseConv,
  kPointwise,
  kDepthwise,
  kInverted,
  kAttention,
  kSplit,
  kJoin,
  kLite,
  kBlock,
  kDown,
  kAdd,
  kMapNorm,
  kWeigh,
  kResize,
  kStateRows,
  kDynamicLite,
  kSpread,
  kMaxPool,
  // write the state
  kCopy,
  kLinear,
  kNorm,
  kAttend,
  kCombine,
  kGate,
  kSlopes,
  kKernels,
  kMix,
  kAffine,
  kPool,
  kPooled,
  kCollect,
  kTurn,
  // write neither
  kHandOut,
};
constexpr int64_t kFirstOfState = kCopy;

// The map that a step writes, and what else it does to it: the bridges of a Mobile-Former. Keys, values and
// queries are rows of tokens in the state; the logits' scale is part of keys and queries.
struct MapOut {
  int64_t map, channels;
  int64_t sums;     // for the next steps: 0 nothing; 1 each channel's sum; 2 and its sum of squares
  int64_t heads;    // of the bridges, 0 where there is none
  int64_t tokens;   // of the bridges
  int64_t row;      // floats from token to token in keys, values and queries
  int64_t scatter;  // of Mobile <- Former: the place of the keys; values lie padded channels later; -1: none
  int64_t gather;   // of the next Mobile -> Former: the place of the queries; -1: none
};

// A padding of zeros on all sides; or as many zeros as make the result's size that of the map divided by the
// stride, rounded up: half of them, rounded down, before the map.
constexpr int64_t kSamePadding = -1;

// A dense convolution, of the image or of a map, where it may be in groups (see gemm_groups).
struct ConvStep {
  MapOut out;
  int64_t input, in_channels, kernel, stride, padding, groups, activation;
  PlanLinear linear;
};
// Whether it reads its input where it lies; see MapSteps::direct_conv.
MFK_PLAN_FUNCTION bool is_direct(const ConvStep& step, int64_t windows) {
  return step.in_channels % 16 == 0 && windows == 1 && step.groups == 1;
}
// A 1x1 convolution, perhaps in groups (see gemm_groups). `affine`: -1, or the place of a factor and, padded
// channels later, a summand for each channel of the input, after which comes a GELU where `affine_gelu`.
struct PointwiseStep {
  MapOut out;
  int64_t input, in_channels, affine, affine_gelu;
  int64_t added;  // a map, or -1
  int64_t groups, activation;
  int64_t slopes;             // -1, or a place; in two rows, of padded channels each
  int64_t attention, tokens;  // attention: -1, or a map, see WeighStep; slopes are then of so many tokens
  int64_t mixed;              // 0 or 1: linear.weight is a place in the state
  PlanLinear linear;
};
// Where it multiplies channels, output j * padded inputs + i comes from input i.
struct DepthwiseStep {
  MapOut out;
  int64_t input, in_channels, kernel, stride, padding, activation, slopes;
  int64_t attention, tokens;  // as of PointwiseStep
  int64_t mixed;              // 0 or 1: taps is a place in the state
  int64_t taps, bias;         // taps: (kernel, kernel, channels)
};
// input + project(gelu(expand(depthwise(input)))); kernel 0: without the depthwise convolution.
struct InvertedStep {
  MapOut out;
  int64_t input, kernel, taps, bias;
  PlanLinear expand, project;
};
// What an attention's result is multiplied by: nothing; or sigmoid, or SiLU, of the gates, and then values go
// through the same function.
enum PlanGating : int64_t { kUngated, kSigmoidGate, kSiluGate };
// Attention of each window; a pixel of the input holds queries, with the logits' scale in them, keys, values
// and gates, each padded for each head. So is a pixel of the output, of `heads` times padded channels where
// there are several.
struct AttentionStep {
  MapOut out;
  int64_t input, heads, depth, channels;  // depth, channels: of a head
  int64_t gating;                         // a PlanGating
  int64_t outside;                        // 0 or 1, see WindowAttention
};
// Channels of its input, and of its output.
MFK_PLAN_FUNCTION int64_t attention_pixel(const AttentionStep& step) {
  const int64_t values = step.gating == kUngated ? 1 : 2;
  return step.heads * (2 * padded(step.depth) + values * padded(step.channels));
}
MFK_PLAN_FUNCTION int64_t attention_result(const AttentionStep& step) {
  return step.heads == 1 ? step.channels : step.heads * padded(step.channels);
}
// Cuts a map, or each window of one, into windows, padded with zeros; joins them again.
struct WindowsStep {
  MapOut out;
  int64_t input, window;
};

// Mobile-Former's blocks. Where a depthwise convolution, 3x3, multiplies channels, its output j * padded
// inputs + i comes from input i; `hidden` are its outputs, so padded, `taps` (3, 3, hidden) and then the bias
// (hidden). `slopes`: places of a dynamic ReLU's larger slope of each channel, then its smaller; where there
// is a map `attention`, of both slopes of each of `tokens` tokens.
// depthwise, relu6, project, + input
struct LiteStep {
  MapOut out;
  int64_t input, in_channels, stride;
  int64_t residual;  // 0 or 1: add the input
  int64_t hidden, taps;
  PlanLinear project;
};
// expand, dynamic ReLU, depthwise, dynamic ReLU, project, + input
struct BlockStep {
  MapOut out;
  int64_t input, in_channels;
  int64_t residual;  // 0 or 1: add the input
  int64_t hidden, taps, slopes1, slopes2;
  int64_t attention, tokens;
  PlanLinear expand, project;
};
// depthwise1, dynamic ReLU, project1, depthwise2, dynamic ReLU, project2, + project1's output
struct DownStep {
  MapOut out;
  int64_t input, in_channels, stride;
  int64_t hidden1, taps1, slopes1;
  int64_t hidden2, taps2, slopes2;
  int64_t attention, tokens;
  PlanLinear project1, project2;
};

// input + added, or the larger of both, and then an activation
struct AddStep {
  MapOut out;
  int64_t input, added;
  int64_t maximum;  // 0 or 1
  int64_t activation;
};
// The largest of some rows and columns; none of the padding.
struct MaxPoolStep {
  MapOut out;
  int64_t input, kernel, stride, padding;
};
// Layer norm of each pixel; gamma and beta are padded.
struct MapNormStep {
  MapOut out;
  int64_t input, gamma, beta;
  int64_t eps;  // the bits of a double
};
// A pixel's weights of the tokens, which mix what these make for it: softmax over the tokens of the heads'
// mean of the logits of Mobile -> Former, which are averaged first where the map becomes smaller, as adaptive
// pooling does. `queries` as those of MapOut. The output's pixels hold padded tokens, as floats in any
// network.
struct WeighStep {
  MapOut out;
  int64_t input, in_channels, stride, heads, tokens, row, queries;
};

// Of a ResizeStep: another size than that of a map.
enum PlanSize : int64_t { kSizeOfImage = -1, kTwiceTheSize = -2, kHalfTheSize = -3 };
// How it finds a pixel's value. By two: as if the result were twice the input, whatever its size is.
enum PlanResampling : int64_t { kNearest, kBilinear, kBilinearByTwo };
// The input in another size, and another map added to it. Half the size, rounded up, takes every second
// pixel.
struct ResizeStep {
  MapOut out;
  int64_t input;
  int64_t like;   // the map whose size it becomes, or a PlanSize
  int64_t added;  // a map of this size, or -1
  int64_t resampling;
};
// Rows of the state as a map of one column.
struct StateRowsStep {
  MapOut out;
  int64_t input;  // -1
  int64_t source, rows, stride;
};
// LiteStep with a dynamic ReLU in the place of relu6, of stride 1, that adds its input.
struct DynamicLiteStep {
  MapOut out;
  int64_t input, in_channels;
  int64_t hidden, taps, slopes;
  PlanLinear project;
};
// Mixing of positions: input + bias + the sum of the tokens' rows of values, so many floats apart, with
// weights (positions, tokens) of their own at each position. Biases are of positions.
struct SpreadStep {
  MapOut out;
  int64_t input, tokens, values, row;
  int64_t positions, weights, bias;
};

// Steps over the state. `source`, `target`, `at` and so on: places; `stride`s: floats from row to row.
// Numbers of the weights, or where `weights` is 0 of the state.
struct CopyStep {
  int64_t weights, source, floats, target;
};
// rows of the target = activation(rows of the source times the matrix), or added to what is there.
struct LinearStep {
  int64_t rows, source, source_stride, target, target_stride, activation;
  int64_t added;  // 0 or 1
  PlanLinear linear;
};
// Layer norm of each row; gamma, then beta, padded.
struct NormStep {
  int64_t rows, width, source, target, gamma;
  int64_t eps;  // the bits of a double
};
// softmax(q k^T / sqrt(depth)) v of each head; columns of the target beyond the heads become zero.
struct AttendStep {
  int64_t rows, heads, depth;
  int64_t queries, keys, values, stride;
  int64_t target, target_stride;
};
// (tokens, padded channels) of Mobile -> Former, from what the last map's step gathered.
struct CombineStep {
  int64_t tokens, channels, heads, target;
};
// Rows times hardsigmoid's double of the gates: relu6(gate + 3) / 3.
struct GateStep {
  int64_t rows, channels, at, at_stride, gates, stride;
};
// Slopes of a dynamic ReLU from its hyper network's hidden units: with c = 2 hardsigmoid(linear(hidden)), c
// of the first half of the outputs and c - 1 of the second. Of one function all outputs are c, which comes
// twice. A row for each token that is mixed; of a single one the larger of each channel, then the smaller.
struct SlopesStep {
  int64_t rows, source, source_stride, target, functions;
  PlanLinear linear;
};
// Weights of the kernels of a dynamic convolution from a token and the means of the last step's map.
struct KernelsStep {
  int64_t token, token_dim, channels;
  PlanLinear hidden, scores;  // hidden: of the token and the means, each padded
  int64_t softmax, kernels;
  int64_t target;
};
// target = w_0 + sum_k a_k w_k over so many blocks of 16 values; the weights hold the first block of all
// kernels, then the second, ...
struct MixStep {
  int64_t attention, kernels;
  int64_t blocks, source, target;  // source: in the weights
  int64_t matrix;                  // 0 or 1: values are stored as those of a matrix, bfloat16 where maps are
};
enum PlanNorm : int64_t { kGroupNorm, kResponseNorm, kResponseNormOfChannels };
// Factors and summands of the last step's channels that a norm amounts to.
struct AffineStep {
  int64_t norm, channels, gamma, beta;
  int64_t eps;  // the bits of a double
  int64_t target;
};
// Means of the last step's channels.
struct PoolStep {
  int64_t channels, target;
};
// hardswish of the means of a map after a 1x1 convolution and relu6, or a dynamic ReLU: slopes are -1, or
// their place.
struct PooledStep {
  int64_t input, in_channels, target, slopes;
  PlanLinear linear;
};
// Mixing of positions: a row of padded channels for each token, its bias and the sum of a map's pixels with
// its weights; or that added to what is there. Weights are (positions, weights_of_position(tokens)).
struct CollectStep {
  int64_t input, in_channels, tokens, target;
  int64_t added;  // 0 or 1
  int64_t positions, weights, bias;
};
// As many rows as there are columns, of padded(rows) floats, and in row c what is in column c of the rows of
// the source; or that added to what is there.
struct TurnStep {
  int64_t rows, columns, source, source_stride, target;
  int64_t added;  // 0 or 1
};

// The next of the maps that are results.
struct HandOutStep {
  int64_t map, channels;
};

// A map of this call: windows one after the other, or one map.
struct StepMap {
  void* data;
  int64_t count, height, width;
};

// Rows above a map, and columns before it, that a step pads it with.
struct Before {
  int64_t rows, columns;
};
template <class Step>
MFK_PLAN_FUNCTION int64_t padding_before(const Step& step, int64_t size) {
  if (step.padding != kSamePadding) return step.padding;
  const int64_t missing = (blocks_of(size, step.stride) - 1) * step.stride + step.kernel - size;
  return missing > 0 ? missing / 2 : 0;
}
template <class Step>
MFK_PLAN_FUNCTION Before padding_before(const Step& step, int64_t height, int64_t width) {
  return {padding_before(step, height), padding_before(step, width)};
}
// Rows of what a step makes of so many, or columns.
template <class Step>
MFK_PLAN_FUNCTION int64_t size_after(const Step& step, int64_t size) {
  if (step.padding == kSamePadding) return blocks_of(size, step.stride);
  return (size + 2 * step.padding - step.kernel + step.stride) / step.stride;
}

MFK_PLAN_FUNCTION int64_t gathered_size(const MapOut& out) {
  return out.gather >= 0 ? out.tokens * (2 * out.heads + out.channels) : 0;
}
// The double of these bits.
MFK_PLAN_FUNCTION double from_bits(int64_t bits) {
  double value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
// Of a CollectStep; those beyond the tokens are zero.
MFK_PLAN_FUNCTION int64_t weights_of_position(int64_t tokens) { return blocks_of(tokens, 4) * 4; }
// Channels of the map that a WeighStep writes for so many tokens.
MFK_PLAN_FUNCTION int64_t attention_channels(int64_t tokens, bool bf16) {
  return padded(tokens) * (bf16 ? 2 : 1);
}
// Doubles that a task leaves for the next steps: see Bridge::gather, then sums, then sums of squares.
MFK_PLAN_FUNCTION int64_t record_size(const MapOut& out) {
  return gathered_size(out) + out.sums * padded(out.channels);
}

// Of the products of a plan that is calibrated: for each the range of its inputs, and what is found of them,
// see Finding.
struct Calibration {
  const double* ranges;
  double* found;
  int64_t products, bins;
};

struct StepArgs {
  const Plan* plan;
  const float* weights;
  float* state;
  int64_t kind;
  const int64_t* fields;  // of the step
  const Images* images;
  int64_t sample;
  StepMap in, added, attention, out;
  int64_t group;  // rows of a task
  // For steps that write a map: offsets of the weights that are read next, and this step's multiply-adds.
  int64_t next, next_end, products;
  double* records;  // one for each task
  // For steps that write the state: the last step that wrote a map, whose records they read; how many, and of
  // how many pixels.
  const MapOut* last;
  int64_t tasks, pixels;
  const Calibration* calibration;  // or null
  bool bytes;                      // whether the step's matrices are int8
};

// The struct of the step's kind.
template <class T>
MFK_PLAN_FUNCTION const T& fields_of(const StepArgs& args) {
  return *reinterpret_cast<const T*>(args.fields);
}

constexpr int64_t kMixTask = 512;       // blocks
constexpr int64_t kAttentionTile = 28;  // queries

// Tasks. A map: one a group of output rows; kAttention: one for kAttentionTile queries of a window's head.
// The state: one; kMix: one for kMixTask blocks; kPooled: one for kOutputsTask outputs; kCollect: for so
// many channels.
MFK_DECLARE_INT8_KERNEL(map_step, StepArgs, args.plan->bf16, args.bytes)
MFK_DECLARE_INT8_KERNEL(block_step, StepArgs, args.plan->bf16, args.bytes)
MFK_DECLARE_DEPLOYED_KERNEL(detector_step, StepArgs, args.plan->bf16)
MFK_DECLARE_DEPLOYED_KERNEL(state_step, StepArgs, args.plan->bf16)

}  // namespace mfk
