#pragma once

#include "../../isa.h"
#include "../feature_map.h"
#include "../sizes.h"

namespace mfk {

// y[b] = conv(x[b], weight + scale * sum_k attention[b,k] basis[k]) + bias + sum_k attention[b,k]
// basis_bias[k].
struct DynamicConvArgs {
  Dtype dtype;
  int64_t batch, groups, inputs, outputs;  // channels of a group
  int64_t kernels;
  int64_t height, width, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  double scale;
  AnyMap x, y;
  // Contiguous; the last two may be null.
  const void *weight, *basis, *attention, *bias, *basis_bias;
  // Work is done for `group_block` groups at a time (of few channels), `out_block` of their outputs or
  // `in_block` of their inputs (all of them where there are several groups), and `rows` rows of the output.
  int64_t group_block, out_block, in_block, rows;
  int64_t pixel_block;   // of 1x1 kernels
  bool inputs_in_lanes;  // for the gradients of kernels: of one group with many inputs, whose x is channels
                         // last
  // Backward.
  AnyMap grad_y, grad_x;
  // Contiguous; the last two may be null. Partial sums for attention: (weight tasks, B, K).
  void *grad_weight, *grad_basis, *grad_bias, *grad_basis_bias;
  double* partial_attention;
};

// Tasks: one for each (sample, groups, outputs, rows); (sample, groups, inputs); (groups, outputs). Each
// stands for a block of these, the last running fastest.
MFK_DECLARE_KERNEL(dynamic_conv2d_forward, DynamicConvArgs)
MFK_DECLARE_KERNEL(dynamic_conv2d_backward_x, DynamicConvArgs)
MFK_DECLARE_KERNEL(dynamic_conv2d_backward_weight, DynamicConvArgs)

// The same of maps with pixels side by side and groups of one channel: those with stride 1 and a padding of
// at most the kernel's reach, pixels being in the lanes, and any, forward with channels in the lanes. Tasks:
// one for each (sample, channels); (channels): blocks of kDepthwiseChannels.
constexpr int64_t kDepthwiseChannels = 16;
MFK_DECLARE_KERNEL(dynamic_depthwise_forward, DynamicConvArgs)
MFK_DECLARE_KERNEL(dynamic_depthwise_backward, DynamicConvArgs)
MFK_DECLARE_KERNEL(dynamic_strided_forward, DynamicConvArgs)
MFK_DECLARE_KERNEL(dynamic_strided_backward, DynamicConvArgs)

// The same of such maps and 1x1 kernels without padding. Tasks: one for each (kPointwiseSamples, group, block
// of outputs, block of pixels); (kPointwiseSamples, group, block of inputs, block of pixels); (group, block
// of outputs).
constexpr int64_t kPointwiseSamples = 4;  // their kernels are mixed together: the basis is read once for them
MFK_DECLARE_KERNEL(dynamic_pointwise_forward, DynamicConvArgs)
MFK_DECLARE_KERNEL(dynamic_pointwise_backward_x, DynamicConvArgs)
MFK_DECLARE_KERNEL(dynamic_pointwise_backward_weight, DynamicConvArgs)

}  // namespace mfk
