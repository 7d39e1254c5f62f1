#include "../cpu/operators/dynamic_conv2d.h"

#include <array>

#include "common.h"

namespace mfk {
namespace {

constexpr const char* kOp = "dynamic_conv2d";
using Ints = std::vector<int64_t>;

// The output's height or width. Of settings that say the same the smallest are taken: a kernel of one place
// has no dilation, and a step beyond the map is one.
int64_t output_size(int64_t size, int64_t kernel, int64_t padding, int64_t& stride, int64_t& dilation) {
  if (kernel == 1) dilation = 1;
  const __int128 whole = size + 2 * static_cast<__int128>(padding),
                 reach = static_cast<__int128>(dilation) * (kernel - 1) + 1;
  STD_TORCH_CHECK(reach <= whole, kOp, ": x is too small for the kernel");
  STD_TORCH_CHECK(whole <= INT64_MAX, kOp, ": padding must be below 2^62, got ", padding);
  stride = std::min(stride, static_cast<int64_t>(whole));
  return static_cast<int64_t>((whole - reach) / stride + 1);
}

struct Call {
  DynamicConvArgs args{};
  Tensor x, weight, basis, attention, bias, basis_bias;
  Ints out_shape;
  bool sparse;  // most of the padded map is read by nobody

  Call(const Tensor& x_in, const Tensor& weight_in, const Tensor& basis_in, const Tensor& attention_in,
       const std::optional<Tensor>& bias_in, const std::optional<Tensor>& basis_bias_in, const Ints& stride,
       const Ints& padding, const Ints& dilation, int64_t groups, double scale) {
    check_axes(kOp, "x", x_in, 4, "(B, C, H, W)");
    check_axes(kOp, "weight", weight_in, 4, "(O, C / groups, kh, kw)");
    check_axes(kOp, "basis", basis_in, 5, "(K, O, C / groups, kh, kw)");
    STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, kOp,
                    ": stride, padding and dilation must be pairs");
    const int64_t channels = x_in.size(1), outputs = weight_in.size(0);
    STD_TORCH_CHECK(groups >= 1 && channels % groups == 0 && outputs % groups == 0, kOp,
                    ": groups must be positive and divide channels and outputs, got ", groups);
    args.dtype = dtype_of(kOp, x_in);
    args.batch = x_in.size(0);
    args.groups = groups;
    args.inputs = channels / groups;
    args.outputs = outputs / groups;
    args.kernels = basis_in.size(0);
    args.height = x_in.size(2);
    args.width = x_in.size(3);
    args.kernel_h = weight_in.size(2);
    args.kernel_w = weight_in.size(3);
    args.stride_h = stride[0];
    args.stride_w = stride[1];
    args.padding_h = padding[0];
    args.padding_w = padding[1];
    args.dilation_h = dilation[0];
    args.dilation_w = dilation[1];
    args.scale = scale;
    const Ints shape = {outputs, args.inputs, args.kernel_h, args.kernel_w};
    check_argument(kOp, "weight", weight_in, x_in, shape);
    check_argument(kOp, "basis", basis_in, x_in, {args.kernels, shape[0], shape[1], shape[2], shape[3]});
    check_argument(kOp, "attention", attention_in, x_in, {args.batch, args.kernels});
    const bool positive = *std::min_element(shape.begin(), shape.end()) >= 1 &&
                          std::min(stride[0], stride[1]) >= 1 && std::min(padding[0], padding[1]) >= 0 &&
                          std::min(dilation[0], dilation[1]) >= 1;
    STD_TORCH_CHECK(positive, kOp,
                    ": weight must not be empty, stride and dilation positive, padding not negative");
    args.out_height = output_size(args.height, args.kernel_h, padding[0], args.stride_h, args.dilation_h);
    args.out_width = output_size(args.width, args.kernel_w, padding[1], args.stride_w, args.dilation_w);
    out_shape = {args.batch, outputs, args.out_height, args.out_width};
    const double taps = static_cast<double>(args.kernel_h * args.kernel_w), out_height = args.out_height,
                 pixels = out_height * args.out_width;
    STD_TORCH_CHECK(
        std::max<double>(args.batch, 1) * std::max(outputs, channels) * taps * pixels <= kMostElements, kOp,
        ": the result would be too large, ", shape_text(out_shape));
    const double planes = (args.height + 2.0 * padding[0]) * (args.width + 2.0 * padding[1]);
    sparse = planes > 4096 + 16 * (args.height * args.width + taps * pixels);
    args.x = map_of(x_in, is_channels_last(x_in), x);
    weight = dense(weight_in);
    basis = dense(basis_in);
    attention = dense(attention_in);
    args.weight = weight.data_ptr();
    args.basis = basis.data_ptr();
    args.attention = attention.data_ptr();
    if (bias_in.has_value()) {
      check_argument(kOp, "bias", *bias_in, x_in, {outputs});
      bias = dense(*bias_in);
      args.bias = bias.data_ptr();
    }
    if (basis_bias_in.has_value()) {
      check_argument(kOp, "basis_bias", *basis_bias_in, x_in, {args.kernels, outputs});
      basis_bias = dense(*basis_bias_in);
      args.basis_bias = basis_bias.data_ptr();
    }
    // Sixteen channels of a map, or a group: one channel of a map that is channels last is slow to read.
    args.group_block =
        std::min<int64_t>(std::max<int64_t>(1, 16 / std::max(args.inputs, args.outputs)), groups);
    args.out_block = args.outputs;
    args.in_block = args.inputs;
    if (sparse) return;
    // So many rows that the inputs of a group stay in the second-level cache.
    const int64_t row = args.group_block * args.inputs * args.stride_h * (args.width + 2 * padding[1]);
    args.rows = std::min(std::max(32768 / std::max<int64_t>(row, 1), args.kernel_h), args.out_height);
    // Where kernels are mixed, all pixels at once: else whole blocks of any vectors.
    args.pixel_block = std::max<int64_t>(args.kernels > 0 ? args.out_height * args.out_width : 768, 1);
  }
  int64_t group_blocks() const { return blocks_of(args.groups, args.group_block); }
  int64_t depth() const { return args.inputs * args.kernel_h * args.kernel_w; }
  bool depthwise() const { return args.inputs == 1 && args.outputs == 1; }
  // The stride is 1, the padding at most the reach of the kernel.
  bool unstrided() const {
    return args.stride_h == 1 && args.stride_w == 1 &&
           args.padding_h <= args.dilation_h * (args.kernel_h - 1) &&
           args.padding_w <= args.dilation_w * (args.kernel_w - 1);
  }
  // Pixels in the lanes: of small kernels, and of rows that fill half of a vector at least.
  bool by_rows() const { return unstrided() && args.kernel_h * args.kernel_w < 25 && args.out_width > 8; }
  bool pointwise() const {
    return args.kernel_h == 1 && args.kernel_w == 1 && args.stride_h == 1 && args.stride_w == 1 &&
           args.padding_h == 0 && args.padding_w == 0;
  }
  int64_t sample_blocks() const { return blocks_of(args.batch, kPointwiseSamples); }
  int64_t depthwise_blocks() const { return blocks_of(args.groups, kDepthwiseChannels); }
};

// Where the padded map is sparse: a 1x1 convolution of what each place of the kernel reads, by PyTorch's own
// operators aten::im2col and, for the gradient, aten::col2im.
struct Unfolded {
  Tensor columns, weight, basis;
  Ints kernel, dilation, padding, stride, size;

  Unfolded(const Call& call, const Tensor& x, const Tensor& weight_in, const Tensor& basis_in)
      : kernel{call.args.kernel_h, call.args.kernel_w},
        dilation{call.args.dilation_h, call.args.dilation_w},
        padding{call.args.padding_h, call.args.padding_w},
        stride{call.args.stride_h, call.args.stride_w},
        size{call.args.height, call.args.width} {
    using torch::stable::detail::from;
    const int64_t outputs = weight_in.size(0), taps = kernel[0] * kernel[1];
    std::array<StableIValue, 5> stack{from(dense(x)), from(kernel), from(dilation), from(padding),
                                      from(stride)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::im2col", "", stack.data(), TORCH_ABI_VERSION));
    columns =
        torch::stable::reshape(torch::stable::detail::to<Tensor>(stack[0]),
                               {x.size(0), x.size(1) * taps, call.args.out_height, call.args.out_width});
    weight = torch::stable::reshape(weight_in, {outputs, call.depth(), 1, 1});
    basis = torch::stable::reshape(basis_in, {basis_in.size(0), outputs, call.depth(), 1, 1});
  }
  // Gradients of x, from those of the columns.
  Tensor folded(const Tensor& grads) const {
    using torch::stable::detail::from;
    const Tensor wide = as_type(torch::stable::flatten(grads, 2, 3), compute_type(grads));
    std::array<StableIValue, 6> stack{from(wide),     from(size),    from(kernel),
                                      from(dilation), from(padding), from(stride)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::col2im", "", stack.data(), TORCH_ABI_VERSION));
    return as_type(torch::stable::detail::to<Tensor>(stack[0]), grads.scalar_type());
  }
};
constexpr int64_t kManyInputs = 16;  // fill the lanes of any vector
const Ints kOnes = {1, 1}, kZeros = {0, 0};

Tensor channels_last(const Tensor& x) { return torch::stable::contiguous(x, MemoryFormat::ChannelsLast); }

void run(const DynamicConvArgs& args, int64_t tasks, int64_t work,
         void (*kernel)(const DynamicConvArgs&, int64_t, int64_t)) {
  parallel_for(tasks, grain(work), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

Tensor forward(const Tensor& x, const Tensor& weight, const Tensor& basis, const Tensor& attention,
               std::optional<Tensor> bias, std::optional<Tensor> basis_bias, Ints stride, Ints padding,
               Ints dilation, int64_t groups, double scale) {
  Call call(x, weight, basis, attention, bias, basis_bias, stride, padding, dilation, groups, scale);
  DynamicConvArgs& args = call.args;
  if (call.sparse) {
    const Unfolded u(call, x, weight, basis);
    const Tensor y = forward(u.columns, u.weight, u.basis, attention, bias, basis_bias, kOnes, kZeros, kOnes,
                             groups, scale);
    return is_channels_last(x) ? channels_last(y) : y;
  }
  if (is_channels_last(x) && (call.depthwise() || call.pointwise())) {
    return channels_last(forward(dense(x), weight, basis, attention, bias, basis_bias, stride, padding,
                                 dilation, groups, scale));
  }
  Tensor y = empty_map(x, call.out_shape), holder;
  args.y = map_of(y, is_channels_last(x), holder);
  const int64_t pixels = args.out_height * args.out_width;
  if (call.depthwise()) {
    run(args, args.batch * call.depthwise_blocks(), kDepthwiseChannels * pixels * call.depth(),
        call.by_rows() ? dynamic_depthwise_forward : dynamic_strided_forward);
  } else if (call.pointwise()) {
    // The mixed kernels of a task stay in the second-level cache; all of them are mixed once.
    if (args.kernels > 0) args.out_block = std::min(std::max<int64_t>(16384 / args.inputs, 8), args.outputs);
    run(args,
        call.sample_blocks() * args.groups * blocks_of(args.outputs, args.out_block) *
            blocks_of(pixels, args.pixel_block),
        kPointwiseSamples * args.out_block * call.depth() * args.pixel_block, dynamic_pointwise_forward);
  } else {
    if (args.group_block == 1) args.out_block = std::min<int64_t>(args.outputs, 48);
    run(args,
        args.batch * call.group_blocks() * blocks_of(args.out_height, args.rows) *
            blocks_of(args.outputs, args.out_block),
        args.group_block * args.out_block * call.depth() * args.rows * args.out_width,
        dynamic_conv2d_forward);
  }
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& weight, const Tensor& basis,
    const Tensor& attention, std::optional<Tensor> bias, std::optional<Tensor> basis_bias, Ints stride,
    Ints padding, Ints dilation, int64_t groups, double scale) {
  Call call(x, weight, basis, attention, bias, basis_bias, stride, padding, dilation, groups, scale);
  DynamicConvArgs& args = call.args;
  check_argument(kOp, "grad_out", grad_out, x, call.out_shape);
  if (call.sparse) {
    const Unfolded u(call, x, weight, basis);
    auto grads = backward(grad_out, u.columns, u.weight, u.basis, attention, bias, basis_bias, kOnes, kZeros,
                          kOnes, groups, scale);
    const Tensor grad_x = u.folded(std::get<0>(grads));
    std::get<0>(grads) = is_channels_last(x) ? channels_last(grad_x) : grad_x;
    std::get<1>(grads) = torch::stable::reshape(std::get<1>(grads), shape_of(weight));
    std::get<2>(grads) = torch::stable::reshape(std::get<2>(grads), shape_of(basis));
    return grads;
  }
  if (is_channels_last(x) && (call.depthwise() || call.pointwise())) {
    auto grads = backward(grad_out, dense(x), weight, basis, attention, bias, basis_bias, stride, padding,
                          dilation, groups, scale);
    std::get<0>(grads) = channels_last(std::get<0>(grads));
    return grads;
  }
  Tensor grad_x = empty_map(x), holder_g, holder_x, holder_last;
  args.grad_y = map_of(grad_out, is_channels_last(x), holder_g);
  args.grad_x = map_of(grad_x, is_channels_last(x), holder_x);
  const bool depthwise = call.depthwise(), pointwise = !depthwise && call.pointwise();
  const int64_t pixels = args.out_height * args.out_width;
  const int64_t work = args.group_block * args.outputs * call.depth() * pixels;
  if (!depthwise) {
    if (args.group_block == 1) args.in_block = std::min<int64_t>(args.inputs, 64);
    const int64_t in_blocks = blocks_of(args.inputs, args.in_block);
    if (pointwise) {
      const int64_t parts = blocks_of(pixels, args.pixel_block);
      run(args, call.sample_blocks() * args.groups * in_blocks * parts,
          kPointwiseSamples * work / in_blocks / parts, dynamic_pointwise_backward_x);
    } else {
      run(args, args.batch * call.group_blocks() * in_blocks, work / in_blocks, dynamic_conv2d_backward_x);
    }
    // The sums of a task stay in the second-level cache.
    if (pointwise || args.group_block == 1) {
      const int64_t fit = 131072 / ((args.kernels + 2) * call.depth());
      args.out_block = std::min(std::max<int64_t>(fit / 8 * 8, 8), args.outputs);  // rows of the products
    }
    args.inputs_in_lanes = !pointwise && args.group_block == 1 && args.inputs >= kManyInputs;
    if (args.inputs_in_lanes) {
      args.x = map_of(x, true, holder_last);
      args.out_block = std::min(std::max<int64_t>(args.out_block, 16), args.outputs);
    }
  }
  const int64_t blocks = depthwise ? call.depthwise_blocks() : pointwise ? args.groups : call.group_blocks();
  int64_t tasks = blocks * blocks_of(args.outputs, args.out_block);
  Tensor grad_weight = empty(shape_of(weight), x.scalar_type(), x);
  Tensor grad_basis = empty(shape_of(basis), x.scalar_type(), x);
  Tensor partial = empty({tasks, args.batch, args.kernels}, ScalarType::Double, x);
  Tensor grad_bias = empty_gradient(bias, x), grad_basis_bias = empty_gradient(basis_bias, x);
  args.grad_weight = grad_weight.data_ptr();
  args.grad_basis = grad_basis.data_ptr();
  if (bias.has_value()) args.grad_bias = grad_bias.data_ptr();
  if (basis_bias.has_value()) args.grad_basis_bias = grad_basis_bias.data_ptr();
  args.partial_attention = partial.mutable_data_ptr<double>();
  if (args.batch == 0) {
    for (Tensor* sum : {&grad_weight, &grad_basis, &grad_bias, &grad_basis_bias}) {
      torch::stable::zero_(*sum);
    }
    tasks = 0;
  }
  run(args, tasks, work * args.batch,
      depthwise   ? (call.unstrided() ? dynamic_depthwise_backward : dynamic_strided_backward)
      : pointwise ? dynamic_pointwise_backward_weight
                  : dynamic_conv2d_backward_weight);
  const Parts parts = {1, 1, partial.size(0), 1, args.batch * args.kernels};
  return {grad_x,    grad_weight,    grad_basis, sum_splits(partial, parts, x, {args.batch, args.kernels}),
          grad_bias, grad_basis_bias};
}

}  // namespace
}  // namespace mfk

STABLE_TORCH_LIBRARY_FRAGMENT(mfkernels, m) {
  m.def(
      "dynamic_conv2d(Tensor x, Tensor weight, Tensor basis, Tensor attention, Tensor? bias, "
      "Tensor? basis_bias, int[] stride, int[] padding, int[] dilation, int groups, float basis_scale) -> "
      "Tensor");
  m.def(
      "dynamic_conv2d_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor basis, Tensor attention, "
      "Tensor? bias, Tensor? basis_bias, int[] stride, int[] padding, int[] dilation, int groups, "
      "float basis_scale) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_basis, Tensor grad_attention, "
      "Tensor grad_bias, Tensor grad_basis_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(mfkernels, CPU, m) {
  m.impl("dynamic_conv2d", TORCH_BOX(&mfk::forward));
  m.impl("dynamic_conv2d_backward", TORCH_BOX(&mfk::backward));
}
