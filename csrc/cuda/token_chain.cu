// The tokens of deployed Mobile-Former blocks on CUDA devices, as mfkernels_cuda::token_chain.
#include "launch.h"
#include "token_chain.cuh"

namespace mfk {
namespace {

constexpr const char* kOp = "token_chain";

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T>
void launch(const Tensor& tokens, const Tensor& gathered, const Tensor& packed,
            const std::vector<int64_t>& offsets, const cuda::ChainSizes& s, Four& results) {
  const int64_t bytes = cuda::chain_rooms(s).total * sizeof(float);
  const auto kernel = cuda::token_chain_kernel<T>;
  const std::string what =
      std::to_string(s.former.tokens) + " tokens of width " + std::to_string(s.former.width);
  cuda::allow_shared(kOp, what, kernel, bytes, tokens.get_device_index());
  const auto to = [](Tensor& t) { return static_cast<T*>(t.data_ptr()); };
  cuda::launch_kernel(kernel, s.samples, cuda::kThreads, bytes, tokens,
                      static_cast<const T*>(tokens.data_ptr()), static_cast<const T*>(gathered.data_ptr()),
                      to(std::get<0>(results)), to(std::get<1>(results)), to(std::get<2>(results)),
                      to(std::get<3>(results)),
                      cuda::chain_weights(static_cast<const T*>(packed.data_ptr()), offsets.data()), s);
}

// sizes: of the block, from heads to token as `chain_sizes` takes them.
Four forward(const Tensor& given, const Tensor& gathered, const Tensor& packed, std::vector<int64_t> offsets,
             std::vector<int64_t> sizes, double eps) {
  const torch::stable::accelerator::DeviceGuard guard(given.get_device_index());
  STD_TORCH_CHECK(given.dim() == 3, kOp, ": tokens must have 3 dimensions (T, B, d), got ", given.dim());
  STD_TORCH_CHECK(offsets.size() == cuda::kChainWeights && sizes.size() == 8, kOp,
                  ": offsets and sizes must be those of a packed block");
  const Tensor tokens = given.stride(2) == 1 ? given : torch::stable::contiguous(given);
  const int64_t count = tokens.size(0), batch = tokens.size(1), width = tokens.size(2);
  const int64_t heads = sizes[0], inputs = sizes[2], outputs = sizes[3];
  check_argument(kOp, "gathered", gathered, tokens, {batch, count, inputs});
  check_argument(kOp, "packed", packed, tokens, {packed.numel()});
  STD_TORCH_CHECK(heads >= 1 && width % heads == 0 && width < 16384 && sizes[1] < 65536 && count < 4096, kOp,
                  ": tokens must have a width that ", heads, " heads divide, got ", width);
  STD_TORCH_CHECK(batch < 2147483648 && inputs < 65536 && outputs < 65536, kOp,
                  ": tokens or channels are too many, got ", batch, " samples of ", inputs, " channels");
  STD_TORCH_CHECK(sizes[7] < count, kOp, ": there is no token ", sizes[7], ", only ", count);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(packed.data_ptr()) % 16 == 0, kOp, ": packed must be aligned");
  std::vector<int64_t> all{batch, count, width};
  all.insert(all.end(), sizes.begin(), sizes.end());
  all.insert(all.end(), {tokens.stride(0), tokens.stride(1)});
  const auto make = [&](std::vector<int64_t> shape) {
    return torch::stable::empty(shape, tokens.scalar_type(), std::nullopt, tokens.device());
  };
  Four results{make({count, batch, width}), make({batch, 2, sizes[5] / 2}), make({batch, 2, sizes[6] / 2}),
               make({2, batch, count, outputs})};
  if (batch == 0) return results;
  const Tensor dense = torch::stable::contiguous(gathered);
  const cuda::ChainSizes s = cuda::chain_sizes(all.data(), static_cast<float>(eps));
  cuda::with_type(kOp, "tokens", tokens,
                  [&](auto number) { launch<decltype(number)>(tokens, dense, packed, offsets, s, results); });
  return results;
}

}  // namespace
}  // namespace mfk

STABLE_TORCH_LIBRARY_FRAGMENT(mfkernels_cuda, m) {
  m.def(
      "token_chain(Tensor tokens, Tensor gathered, Tensor packed, int[] offsets, int[] sizes, float eps) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mfkernels_cuda, CUDA, m) { m.impl("token_chain", TORCH_BOX(&mfk::forward)); }
