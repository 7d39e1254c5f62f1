// The arguments of former_block, checked, for any device.
#pragma once

#include "../cpu/operators/former_block.h"
#include "common.h"

namespace mfk {

struct FormerCall {
  FormerArgs args{};
  Tensor x, parameters[12];

  FormerCall(const Tensor& tokens, const std::optional<Tensor> (&given)[12], int64_t num_heads,
             const std::string& form, double eps) {
    constexpr const char* kOp = "former_block";
    constexpr const char* kNames[] = {"qkv_weight",   "qkv_bias",   "proj_weight",  "proj_bias",
                                      "norm1_weight", "norm1_bias", "fc1_weight",   "fc1_bias",
                                      "fc2_weight",   "fc2_bias",   "norm2_weight", "norm2_bias"};
    check_axes(kOp, "tokens", tokens, 3, "(B, T, d)");
    STD_TORCH_CHECK(form == "released" || form == "standard", kOp,
                    ": form must be 'released' or 'standard', got '", form, "'");
    args.standard = form == "standard";
    args.ffn = given[6].has_value();
    args.batch = tokens.size(0);
    args.tokens = tokens.size(1);
    args.width = tokens.size(2);
    args.heads = num_heads;
    args.eps = eps;
    STD_TORCH_CHECK(args.width >= 1, kOp, ": tokens must have a width of at least 1");
    check_heads(kOp, num_heads, args.width, "the width of tokens");
    STD_TORCH_CHECK(args.ffn || !args.standard, kOp, ": the standard form needs fc1_weight");
    if (args.ffn) {
      check_axes(kOp, "fc1_weight", *given[6], 2, "(h, d)");
      args.hidden = given[6]->size(0);
    }
    const int64_t d = args.width, queries = args.standard ? 3 * d : d, hidden = args.hidden;
    const std::vector<int64_t> shapes[] = {{queries, d}, {queries}, {d, d},      {d}, {d}, {d},
                                           {hidden, d},  {hidden},  {d, hidden}, {d}, {d}, {d}};
    const void** pointers[] = {&args.qkv_weight,   &args.qkv_bias,   &args.proj_weight,  &args.proj_bias,
                               &args.norm1_weight, &args.norm1_bias, &args.fc1_weight,   &args.fc1_bias,
                               &args.fc2_weight,   &args.fc2_bias,   &args.norm2_weight, &args.norm2_bias};
    for (int i = 0; i < 12; ++i) {
      const bool optional = i == 1 || i == 3 || i == 7 || i == 9;  // biases of linear layers
      const bool needed = !optional && (i < 6 || args.ffn);
      STD_TORCH_CHECK(given[i].has_value() || !needed, kOp, ": ", kNames[i], " must be given");
      STD_TORCH_CHECK(i < 6 || args.ffn || !given[i].has_value(), kOp, ": ", kNames[i],
                      " must be left out where fc1_weight is");
      if (!given[i].has_value()) continue;
      check_argument(kOp, kNames[i], *given[i], tokens, shapes[i]);
      parameters[i] = dense(*given[i]);
      *pointers[i] = parameters[i].data_ptr();
    }
    x = dense(tokens);
    args.x = x.data_ptr();
  }
};

}  // namespace mfk
