// A whole Mobile-Former, prepared for inference by mfkernels.deploy: batch norms folded, weights packed.
//
// A plan is a list of 64-bit integers, read here as a MobileFormerPlan; mfkernels/deploy/mobile_former.py
// writes the fields in this order. Feature maps are
// channels last; their channels are padded to a multiple of 16, and what the padding holds is zero. They are
// float, or bfloat16.
//
// A pass writes one map, row by row, and does to a row all that is to be done while it is in cache: Mobile
// <- Former, and the part of the next Mobile -> Former that this row has. Between passes a step over the few
// tokens makes all that the next pass needs of them.
#pragma once

#include "deployed.h"
#include "images.h"

namespace mfk {

// The step before a pass.
struct PlanTokens {
  int64_t bridge_channels;  // of the map that the last pass gathered from; 0: it did not, tokens stay
  int64_t gate;             // 0 or 1: whether what was gathered is multiplied by the gate
  PlanLinear project;       // channels -> token width
  int64_t norm;             // gamma, then beta
  int64_t former;           // 0 or 1
  PlanLinear former_query, former_mix;
  int64_t former_norm;
  int64_t ffn;  // 0 or 1
  PlanLinear ffn_in, ffn_out;
  int64_t ffn_norm;
  PlanLinear squeeze;           // the token -> hidden units of both hyper networks, one after the other
  PlanLinear slopes1, slopes2;  // hidden units -> slopes of the two functions, each of padded channels
  PlanLinear generate;          // tokens -> [keys, values], [queries, gates], each of padded channels
};

enum PlanKind : int64_t { kStem = 0, kLite = 1, kBlock = 2, kDown = 3 };

// kStem:  3x3 convolution of the image with stride 2, relu6
// kLite:  depthwise1, relu6, pointwise2
// kBlock: pointwise1, dynamic ReLU, depthwise1, dynamic ReLU, pointwise2
// kDown:  depthwise1, dynamic ReLU, pointwise1, depthwise2, dynamic ReLU, pointwise2, + pointwise1's output
struct PlanPass {
  PlanTokens tokens;
  int64_t kind, in_channels, out_channels, stride;
  int64_t residual;  // 0 or 1: add the input (kLite, kBlock)
  // Padded channels after depthwise1 (kBlock: also before it) and after depthwise2. Where a depthwise
  // convolution multiplies channels, its output j * padded inputs + i comes from input i.
  int64_t hidden1, hidden2;
  int64_t depthwise1, depthwise2;  // taps (3, 3, hidden), then bias (hidden)
  PlanLinear pointwise1, pointwise2;
  int64_t scatter, gather, gate;  // 0 or 1: Mobile <- Former; the next Mobile -> Former, and its gate
  int64_t hand_out;               // 0 or 1: the map is a result
};

struct MobileFormerPlan {
  int64_t weights;  // floats
  int64_t bf16;     // 0 or 1: matrices and maps in bfloat16, all else in float
  int64_t tokens, token_dim, heads, former_heads, hyper_token;
  int64_t class_tokens;
  int64_t first_tokens;  // (tokens, padded token width)
  PlanTokens last;       // the last Mobile -> Former
  // fc's inputs: head's outputs, then the class tokens. Where maps are the results, these are of no outputs,
  // and neither they nor `last` are run.
  PlanLinear head, fc, classifier;
  int64_t passes;
  // PlanPass pass[passes] follows
};

MFK_PLAN_FUNCTION const PlanPass* passes_of(const MobileFormerPlan& plan) {
  return reinterpret_cast<const PlanPass*>(&plan + 1);
}

// What the tokens give a pass, and the tokens; pointers into the memory of a sample.
struct TokenState {
  float* tokens;   // (tokens, padded token width)
  float* slopes1;  // of the first activation: slope 1 of all channels, then slope 2
  float* slopes2;
  float* made;  // (tokens, generate.outputs)
};

struct PassArgs {
  const MobileFormerPlan* plan;
  const PlanPass* pass;
  const float* weights;
  TokenState state;
  // kStem: this sample's image; else `in`.
  const Images* images;
  int64_t sample;
  const void* in;
  int64_t height, width;          // of the input
  int64_t out_height, out_width;  // of the output
  void* out;
  int64_t group;                      // rows of a task
  double* gathered;                   // a record for each task, see Bridge::gather
  float* (*scratch)(int64_t floats);  // working memory of the calling thread
};

MFK_PLAN_FUNCTION int64_t record_size(const MobileFormerPlan& plan, int64_t channels) {
  return plan.heads * plan.tokens * (2 + channels / plan.heads);
}

struct TokensArgs {
  const MobileFormerPlan* plan;
  const PlanTokens* step;
  const PlanPass *before, *pass;  // the last pass, null at the beginning; the next one, null at the end
  const float* weights;
  TokenState state;
  const double* gathered;
  int64_t records;
  float* (*scratch)(int64_t floats);
};

struct HeadArgs {
  const MobileFormerPlan* plan;
  const float* weights;
  const void* in;  // (pixels, padded channels)
  int64_t pixels;
  float* pooled;
  float* (*scratch)(int64_t floats);
};

// Tasks: one a group of output rows; exactly one; one a panel of 32 outputs.
MFK_DECLARE_DEPLOYED_KERNEL(mobile_former_pass, PassArgs, args.plan->bf16)
MFK_DECLARE_DEPLOYED_KERNEL(mobile_former_tokens, TokensArgs, args.plan->bf16)
MFK_DECLARE_DEPLOYED_KERNEL(mobile_former_head, HeadArgs, args.plan->bf16)

}  // namespace mfk
