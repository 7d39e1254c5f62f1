#include "../cpu/operators/modulation_attention.h"

#include "common.h"

namespace mfk {
namespace {

constexpr const char* kOp = "modulation_attention";

struct Call {
  ModulationArgs args{};
  Tensor q, k, v, gate;

  Call(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& gate_in,
       std::optional<double> scale, const std::string& form, std::optional<int64_t> window_size) {
    check_axes(kOp, "q", q_in, 4, "(B, D, H, W)");
    check_axes(kOp, "v", v_in, 4, "(B, C, H, W)");
    STD_TORCH_CHECK(form == "released" || form == "paper", kOp, ": form must be 'released' or 'paper', got '",
                    form, "'");
    const int64_t height = q_in.size(2), width = q_in.size(3);
    args.dtype = dtype_of(kOp, q_in);
    args.outside = form == "paper";
    args.batch = q_in.size(0);
    args.depth = q_in.size(1);
    args.channels = v_in.size(1);
    args.width = width;
    const std::vector<int64_t> shape = {args.batch, args.channels, height, width};
    check_argument(kOp, "k", k_in, q_in, shape_of(q_in));
    check_argument(kOp, "v", v_in, q_in, shape);
    check_argument(kOp, "gate", gate_in, q_in, shape);
    STD_TORCH_CHECK(args.depth >= 1, kOp, ": q must have at least one channel");
    if (window_size.has_value()) {
      const int64_t size = *window_size;
      STD_TORCH_CHECK(size >= 1 && height % size == 0 && width % size == 0, kOp,
                      ": window_size must be positive and divide height and width, got ", size);
      args.window_h = args.window_w = height * width == 0 ? 1 : size;
      args.windows_y = height / size;
      args.windows_x = width / size;
    } else {
      args.window_h = height;
      args.window_w = width;
      args.windows_y = args.windows_x = 1;
    }
    args.scale = scale.has_value() ? *scale : 1 / std::sqrt(static_cast<double>(args.depth));
    args.q = map_of(q_in, is_channels_last(q_in), q);
    args.k = map_of(k_in, is_channels_last(k_in), k);
    args.v = map_of(v_in, is_channels_last(v_in), v);
    args.gate = map_of(gate_in, is_channels_last(gate_in), gate);
  }
  int64_t windows() const { return args.batch * args.windows_y * args.windows_x; }
  int64_t pixels() const { return args.window_h * args.window_w; }
  int64_t tiles() const { return blocks_of(pixels(), kModulationTile); }
  int64_t work() const { return kModulationTile * pixels() * (args.depth + args.channels); }  // of a tile
};

Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate,
               std::optional<double> scale, std::string form, std::optional<int64_t> window_size) {
  Call call(q, k, v, gate, scale, form, window_size);
  Tensor y = empty_map(v), holder;
  call.args.y = map_of(y, is_channels_last(v), holder);
  parallel_for(call.windows() * call.tiles(), grain(call.work()),
               [&](int64_t begin, int64_t end) { modulation_attention_forward(call.args, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& out,
                                                    const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const Tensor& gate, std::optional<double> scale,
                                                    std::string form, std::optional<int64_t> window_size) {
  Call call(q, k, v, gate, scale, form, window_size);
  check_argument(kOp, "grad_out", grad_out, q, shape_of(v));
  check_argument(kOp, "out", out, q, shape_of(v));
  ModulationArgs& args = call.args;
  Tensor grads[] = {empty_map(q), empty_map(k), empty_map(v), empty_map(gate)};
  const Tensor* inputs[] = {&q, &k, &v, &gate};
  AnyMap* maps[] = {&args.grad_q, &args.grad_k, &args.grad_v, &args.grad_gate};
  Tensor holders[4], holder_g, holder_y;
  for (int i = 0; i < 4; ++i) *maps[i] = map_of(grads[i], is_channels_last(*inputs[i]), holders[i]);
  args.grad_y = map_of(grad_out, is_channels_last(grad_out), holder_g);
  args.y = map_of(out, is_channels_last(out), holder_y);
  // Few groups, since each has sums of its own; but more than one where a window alone is work for many
  // cores.
  const int64_t wanted = std::clamp<int64_t>(call.tiles() / 8, 1, 8);
  const int64_t tiles = std::max<int64_t>(1, blocks_of(call.tiles(), wanted));
  args.group = tiles * kModulationTile;
  args.groups = std::max<int64_t>(1, blocks_of(call.pixels(), args.group));
  Tensor partial = empty({args.groups == 1 ? 0 : call.windows() * args.groups * modulation_sums(args)},
                         compute_type(q), q);
  args.partial = partial.data_ptr();
  const int64_t tasks = call.pixels() == 0 ? 0 : call.windows() * args.groups;
  parallel_for(tasks, grain(tiles * call.work()),
               [&](int64_t begin, int64_t end) { modulation_attention_backward(args, begin, end); });
  if (args.groups > 1) {
    parallel_for(call.windows(), grain(args.groups * modulation_sums(args)),
                 [&](int64_t begin, int64_t end) { modulation_attention_backward_sum(args, begin, end); });
  }
  return {grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace
}  // namespace mfk

STABLE_TORCH_LIBRARY_FRAGMENT(mfkernels, m) {
  m.def(
      "modulation_attention(Tensor q, Tensor k, Tensor v, Tensor gate, float? scale=None, "
      "str form=\"released\", int? window_size=None) -> Tensor");
  m.def(
      "modulation_attention_backward(Tensor grad_out, Tensor out, Tensor q, Tensor k, Tensor v, Tensor gate, "
      "float? scale=None, str form=\"released\", int? window_size=None) -> (Tensor grad_q, Tensor grad_k, "
      "Tensor grad_v, Tensor grad_gate)");
}

STABLE_TORCH_LIBRARY_IMPL(mfkernels, CPU, m) {
  m.impl("modulation_attention", TORCH_BOX(&mfk::forward));
  m.impl("modulation_attention_backward", TORCH_BOX(&mfk::backward));
}
