// The bottlenecks of deployed networks on CUDA devices, as mfkernels_cuda::dynamic_bottleneck.
#include "dynamic_bottleneck.cuh"
#include "launch.h"

namespace mfk {
namespace {

constexpr const char* kOp = "dynamic_bottleneck";

struct Launch {
  cuda::BottleneckSizes sizes;
  int tokens, heads;  // of the bridge
  int64_t blocks;
};

cuda::MapStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

template <class T, int kColumns>
void launch(const Launch& l, const Tensor& x, Tensor& y, const cuda::BottleneckWeights<T>& weights,
            const cuda::BridgeBack<T>& bridge) {
  const int bytes = cuda::BottleneckRooms<T>(l.sizes, 16 * kColumns).total;
  const auto kernel = cuda::dynamic_bottleneck_kernel<T, kColumns>;
  cuda::allow_shared(kOp, std::to_string(l.sizes.inputs) + " channels", kernel, bytes, x.get_device_index());
  cuda::launch_kernel(kernel, l.blocks, cuda::kBottleneckThreads, bytes, x,
                      static_cast<const T*>(x.data_ptr()), strides_of(x), static_cast<T*>(y.data_ptr()),
                      strides_of(y), weights, bridge, l.sizes);
}

template <class T>
void launch(const Launch& l, const Tensor& x, Tensor& y, const Tensor (&given)[10]) {
  cuda::BottleneckWeights<T> weights;
  const T** pointers[] = {&weights.slopes1,     &weights.slopes2,     &weights.expand,
                          &weights.expand_bias, &weights.depthwise,   &weights.depthwise_bias,
                          &weights.project,     &weights.project_bias};
  for (int i = 0; i < 8; ++i) *pointers[i] = static_cast<const T*>(given[i].data_ptr());
  const cuda::BridgeBack<T> bridge{static_cast<const T*>(given[8].data_ptr()),
                                   static_cast<const T*>(given[9].data_ptr()), l.tokens, l.heads};
  if (l.sizes.outputs <= 64) return launch<T, 4>(l, x, y, weights, bridge);
  if (l.sizes.outputs <= 128) return launch<T, 8>(l, x, y, weights, bridge);
  launch<T, 16>(l, x, y, weights, bridge);
}

Tensor forward(const Tensor& x, const Tensor& slopes1, const Tensor& slopes2, const Tensor& expand,
               const Tensor& expand_bias, const Tensor& depthwise, const Tensor& depthwise_bias,
               const Tensor& project, const Tensor& project_bias, const Tensor& keys, const Tensor& values,
               int64_t num_heads, bool skip) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  STD_TORCH_CHECK(x.dim() == 4, kOp, ": x must have 4 dimensions (B, C, H, W), got ", x.dim());
  STD_TORCH_CHECK(expand.dim() == 4 && project.dim() == 4, kOp, ": weights must have 4 dimensions");
  const int64_t batch = x.size(0), inputs = x.size(1), hidden = expand.size(0), outputs = project.size(0);
  check_argument(kOp, "slopes1", slopes1, x, {batch, 2, hidden});
  check_argument(kOp, "slopes2", slopes2, x, {batch, 2, hidden});
  check_argument(kOp, "expand_weight", expand, x, {hidden, inputs, 1, 1});
  check_argument(kOp, "expand_bias", expand_bias, x, {hidden});
  check_argument(kOp, "depthwise_weight", depthwise, x, {hidden, 1, 3, 3});
  check_argument(kOp, "depthwise_bias", depthwise_bias, x, {hidden});
  check_argument(kOp, "project_weight", project, x, {outputs, hidden, 1, 1});
  check_argument(kOp, "project_bias", project_bias, x, {outputs});
  STD_TORCH_CHECK(!skip || inputs == outputs, kOp, ": with skip, project_weight must have ", inputs,
                  " outputs, got ", outputs);
  STD_TORCH_CHECK(keys.dim() == 3, kOp, ": keys must have 3 dimensions (B, T, O), got ", keys.dim());
  const int64_t tokens = keys.size(1);
  check_argument(kOp, "keys", keys, x, {batch, tokens, outputs});
  check_argument(kOp, "values", values, x, {batch, tokens, outputs});
  STD_TORCH_CHECK(tokens >= 1 && tokens <= cuda::kMostTokens, kOp, ": keys must be of 1 to ",
                  cuda::kMostTokens, " tokens, got ", tokens);
  STD_TORCH_CHECK(num_heads >= 1 && outputs % num_heads == 0, kOp, ": num_heads must divide ", outputs,
                  " outputs, got ", num_heads);
  STD_TORCH_CHECK(outputs <= 256, kOp, ": project_weight must have at most 256 outputs, got ", outputs);
  STD_TORCH_CHECK(inputs < 65536 && hidden < 65536 && x.size(2) < 65536 && x.size(3) < 65536, kOp,
                  ": x is too large");
  Tensor y = torch::stable::empty(
      {batch, outputs, x.size(2), x.size(3)}, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
      is_channels_last(x) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  if (y.numel() == 0) return y;
  Tensor given[] = {slopes1,        slopes2, expand,       expand_bias, depthwise,
                    depthwise_bias, project, project_bias, keys,        values};
  for (Tensor& t : given) t = cuda::aligned(torch::stable::contiguous(t));
  const auto tiles = [](int64_t pixels) { return (pixels + cuda::kTile - 1) / cuda::kTile; };
  const int64_t blocks = batch * tiles(x.size(2)) * tiles(x.size(3));
  STD_TORCH_CHECK(blocks < 2147483648, kOp, ": x is too large");
  const Launch l{{static_cast<int>(inputs), static_cast<int>(hidden), static_cast<int>(outputs),
                  static_cast<int>(x.size(2)), static_cast<int>(x.size(3)), skip},
                 static_cast<int>(tokens),
                 static_cast<int>(num_heads),
                 blocks};
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Float, kOp, ": x must be bfloat16 or float16");
  cuda::with_type(kOp, "x", x, [&](auto number) {
    if constexpr (sizeof number == 2) launch<decltype(number)>(l, x, y, given);
  });
  return y;
}

}  // namespace
}  // namespace mfk

STABLE_TORCH_LIBRARY_FRAGMENT(mfkernels_cuda, m) {
  m.def(
      "dynamic_bottleneck(Tensor x, Tensor slopes1, Tensor slopes2, Tensor expand_weight, "
      "Tensor expand_bias, Tensor depthwise_weight, Tensor depthwise_bias, Tensor project_weight, "
      "Tensor project_bias, Tensor keys, Tensor values, int num_heads, bool skip) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mfkernels_cuda, CUDA, m) { m.impl("dynamic_bottleneck", TORCH_BOX(&mfk::forward)); }
