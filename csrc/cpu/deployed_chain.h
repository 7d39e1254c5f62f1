// A network as a chain of steps, prepared for inference by mfkernels.deploy: norms folded, weights packed.
//
// Steps work on a few feature maps, which they name by numbers, and on a state of floats, in which they name
// places. A plan is a list of 64-bit integers: a ChainPlan, its linear layers, then its steps, each a
// ChainStep and the fields of its kind; mfkernels/deploy/chain.py writes them in this order. Feature maps are
// channels last; their channels are padded to a multiple of 16, and what the padding holds is zero. They are
// float, or bfloat16.
#pragma once

#include "deployed.h"
#include "images.h"

namespace mfk {

struct ChainPlan {
  int64_t weights;  // floats
  int64_t bf16;     // 0 or 1: matrices and maps in bfloat16, all else in float
  int64_t in_channels;
  int64_t maps, state;     // how many maps; floats of the state
  int64_t features;        // the place of the first linear layer's inputs
  int64_t linears, steps;  // linears: 0 where maps are the results
  // ChainLinear linear[linears], then the steps
};
struct ChainLinear {
  int64_t activation;
  PlanLinear linear;
};
struct ChainStep {
  int64_t kind, words;  // words: of the fields that follow
};

// The map that a step writes, and what the next steps want to know of it.
struct ChainOut {
  int64_t map, channels;
  int64_t sums;     // 0: nothing; 1: each channel's sum; 2: and its sum of squares
  int64_t heads;    // of a Mobile -> Former that the map is read by, 0 for none
  int64_t tokens;   // its tokens
  int64_t queries;  // the place of its queries: (tokens, padded channels), the logits' scale in them
};

enum ChainKind : int64_t {
  // write a map
  kImageConv,
  kDenseConv,
  kPointwise,
  kDepthwise,
  kInverted,
  kAttention,
  kSplit,
  kJoin,
  // write the state
  kTokens,
  kKernels,
  kMix,
  kAffine,
  kPool,
  // write neither
  kHandOut,
};
constexpr int64_t kFirstOfState = kTokens;

// A dense convolution, its padding half its kernel; of the image or of a map.
struct ChainConv {
  ChainOut out;
  int64_t in, in_channels, kernel, stride, gelu;
  PlanLinear linear;
};
// A 1x1 convolution, perhaps in groups (see gemm_groups). `affine`: -1, or the place of a factor and, padded
// channels later, a summand for each channel of the input, after which comes a GELU where `affine_gelu`.
struct ChainPointwise {
  ChainOut out;
  int64_t in, in_channels, affine, affine_gelu;
  int64_t added;  // a map, or -1
  int64_t groups, gelu;
  int64_t mixed;  // 0 or 1: linear.weight is a place in the state
  PlanLinear linear;
};
struct ChainDepthwise {
  ChainOut out;
  int64_t in, kernel, stride, gelu;
  int64_t mixed;       // 0 or 1: taps is a place in the state
  int64_t taps, bias;  // (kernel, kernel, channels)
};
// in + project(gelu(expand(depthwise(in)))); kernel 0: without the depthwise convolution.
struct ChainInverted {
  ChainOut out;
  int64_t in, kernel, taps, bias;
  PlanLinear expand, project;
};
// Modulation attention of each window; a pixel of `in` holds queries, with the logits' scale in them, keys,
// values and gates, each padded.
struct ChainAttention {
  ChainOut out;
  int64_t in, depth;
  int64_t outside;  // 0 or 1, see WindowAttention
};
// Cuts a map into windows, padded with zeros; joins them again.
struct ChainWindows {
  ChainOut out;
  int64_t in, window;
};

// What Dynamic Mobile-Former does to its tokens, (tokens, padded dim) at the place `at`. Layer norms:
// gamma, then beta, padded.
struct ChainTokens {
  int64_t tokens, dim, at;
  int64_t first;            // -1, or the weights that they begin as
  int64_t bridge_channels;  // of the map that the last step gathered from; 0: it did not
  int64_t bridge_heads;
  PlanLinear bridge;  // adds to the tokens
  int64_t former;     // 0 or 1
  int64_t heads, norm1;
  PlanLinear qkv, project;  // each of q, k, v padded
  int64_t norm2;
  PlanLinear expand, shrink;
  int64_t keep;  // -1, or a place to which the first token is copied
  int64_t norm;  // -1, or that of the next Mobile -> Former: the tokens stay normalised
  PlanLinear query;
  int64_t queries;  // a place
};
// Weights of the kernels of a dynamic convolution from a token and the means of the last step's map.
struct ChainKernels {
  int64_t token, token_dim, channels;
  PlanLinear hidden, scores;  // hidden: of the token and the means, each padded
  int64_t softmax, kernels;
  int64_t to;  // a place
};
// to = w_0 + sum_k a_k w_k over so many blocks of 16 values; the weights hold the first block of all kernels,
// then the second, ...
struct ChainMix {
  int64_t attention, kernels;
  int64_t blocks, from, to;
  int64_t matrix;  // 0 or 1: values are stored as those of a matrix, bfloat16 where maps are
};
enum ChainNorm : int64_t { kGroupNorm, kResponseNorm, kResponseNormOfChannels };
// Factors and summands of the last step's channels that a norm amounts to.
struct ChainAffine {
  int64_t norm, channels, gamma, beta;
  int64_t eps;  // the bits of a double
  int64_t to;
};
// Means of the last step's channels.
struct ChainPool {
  int64_t channels, to;
};

// The next of the maps that are results.
struct ChainHandOut {
  int64_t map, channels;
};

// A map of this call: windows one after the other, or one map.
struct ChainMap {
  void* data;
  int64_t count, height, width;
};

MFK_PLAN_FUNCTION int64_t chain_record_size(const ChainOut& out) {
  const int64_t gathered = out.heads > 0 ? out.tokens * (2 * out.heads + out.channels) : 0;
  return gathered + out.sums * padded(out.channels);
}

struct ChainArgs {
  const ChainPlan* plan;
  const float* weights;
  float* state;
  int64_t kind;
  const int64_t* fields;  // of the step
  const Images* images;
  int64_t sample;
  ChainMap in, added, out;
  int64_t group;    // rows of a task
  double* records;  // for each task: what a Mobile -> Former gathers, sums, sums of squares
  // For steps that write the state: the step whose records they read, how many, and of how many pixels.
  const ChainOut* last;
  int64_t tasks, pixels;
  float* (*scratch)(int64_t floats);  // working memory of the calling thread
};

constexpr int64_t kMixTask = 512;       // blocks
constexpr int64_t kAttentionTile = 28;  // queries

// Tasks. A map: one a group of output rows; kAttention: one for kAttentionTile queries of a window. The
// state: one; kMix: one for kMixTask blocks.
MFK_DECLARE_DEPLOYED_KERNEL(chain_map, ChainArgs, args.plan->bf16)
MFK_DECLARE_DEPLOYED_KERNEL(chain_state, ChainArgs, args.plan->bf16)

}  // namespace mfk
