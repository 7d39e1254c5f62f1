#include "deployed_attention.h"
#include "map_step.h"

namespace mfk {
namespace MFK_ISA {
namespace {

struct MapSteps : MapTasks {
  using MapTasks::MapTasks;

  // Calls f with what is done to a sum: bias, then the activation.
  template <class F>
  static void with_activation(int64_t activation, const float* bias, F f) {
    if (activation == kGelu) return f(AddBiasGelu{bias});
    if (activation == kRelu6) return f(AddBiasRelu6{bias});
    f(AddBias{bias});
  }
  // The same, perhaps with slopes.
  template <class F>
  void with_activation(int64_t activation, const float* bias, int64_t slopes, F f) const {
    if (activation == kDynamicRelu) {
      return f(AddBiasDynamicRelu{bias, place(slopes), place(slopes) + out_channels});
    }
    if (activation == kScaledRelu6) return f(AddBiasScaledRelu6{bias, place(slopes)});
    with_activation(activation, bias, f);
  }

  void image_conv(const ConvStep& step, int64_t begin, int64_t end) {
    const int64_t k = step.kernel, channels = step.in_channels;
    const int64_t line = round_up(((args.out.width - 1) * step.stride + 2 * k) * channels, 2);
    const auto space = room<1>({k * line});
    Stored* lines = space.stored(0);  // (kernel, pixels, channels)
    memset(lines, 0, k * line * sizeof(Stored));
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      for (int64_t r = r0; r < r1; ++r) {
        // Those that the row before needed, too, are there.
        const int64_t kept = r > r0 && step.stride < k ? k - step.stride : 0;
        memmove(lines, lines + (k - kept) * line, kept * line * sizeof(Stored));
        for (int64_t i = kept; i < k; ++i) {
          image_line(*args.images, channels, args.sample, r * step.stride - k / 2 + i,
                     lines + i * line + k / 2 * channels);
        }
        convolve(step, args.out.width, Rows<Stored>{lines, step.stride * channels, k, k * channels, line},
                 out_row(r));
      }
    });
  }
  void convolve(const ConvStep& step, int64_t positions, Rows<Stored> x, Stored* out) {
    with_activation(step.activation, at(step.linear.bias), [&](auto epilogue) {
      gemm(positions, x, matrix(step.linear), out, out_channels, epilogue);
    });
  }

  // Whole vectors: what is too much is written over by what comes next.
  static MFK_INLINE void copy_vectors(const Stored* from, int64_t count, Stored* to) {
    for (int64_t c = 0; c < count; c += kLanes<float>) store(to + c, load(from + c));
  }
  // Each output's inputs side by side, then one product.
  void dense_conv(const ConvStep& step, int64_t begin, int64_t end) {
    const int64_t k = step.kernel, channels = step.in_channels, pixel = padded(channels);
    const int64_t inputs = k * k * channels, patch = padded(inputs), width = args.out.width;
    const auto space = room<2>({args.group * width * patch + 16, pixel});
    Stored *patches = space.stored(0), *zeros = space.stored(1);
    memset(zeros, 0, pixel * sizeof(Stored));
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      Stored* to = patches;
      for (int64_t r = r0; r < r1; ++r) {
        const Stored* rows[16];
        for (int64_t ky = 0; ky < k; ++ky) {
          rows[ky] = in_row(r, r % args.out.height * step.stride + ky - k / 2, pixel, nullptr);
        }
        for (int64_t x = 0; x < width; ++x, to += patch) {
          const int64_t left = x * step.stride - k / 2;
          Stored* tap = to;
          for (int64_t ky = 0; ky < k; ++ky) {
            const Stored* row = rows[ky] == nullptr ? nullptr : rows[ky] + left * pixel;
            if (row != nullptr && left >= 0 && left + k <= args.in.width && channels == pixel) {
              copy_vectors(row, k * channels, tap);
              tap += k * channels;
              continue;
            }
            for (int64_t kx = 0; kx < k; ++kx, tap += channels) {
              const bool inside = row != nullptr && left + kx >= 0 && left + kx < args.in.width;
              copy_vectors(inside ? row + kx * pixel : zeros, channels, tap);
            }
          }
          memset(tap, 0, (patch - inputs) * sizeof(Stored));
        }
      }
      convolve(step, (r1 - r0) * width, Rows<Stored>{patches, patch, 1, inputs, 0}, out_row(r0));
    });
  }

  void pointwise(const PointwiseStep& step, int64_t begin, int64_t end) {
    const int64_t channels = padded(step.in_channels), width = args.out.width;
    const bool changed = step.affine >= 0;
    const auto space = room<1>({changed ? args.group * width * channels : 0});
    const float* weights = step.mixed ? place(step.linear.weight) : at(step.linear.weight);
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      const int64_t positions = (r1 - r0) * width;
      const Stored* x = in_row(r0, channels);
      if (changed) {
        change(step, x, positions, channels, space.stored(0));
        x = space.stored(0);
      }
      const Rows<Stored> rows{x, channels, 1, step.in_channels, 0};
      Stored* out = out_row(r0);
      auto run = [&](auto epilogue) {
        if (step.groups > 1) {
          gemm_groups(positions, rows, step.groups, Weights{weights, made.channels, &fetched}, out,
                      out_channels, epilogue);
        } else {
          gemm(positions, rows, Weights{weights, step.linear.outputs, &fetched}, out, out_channels, epilogue);
        }
      };
      const float* bias = at(step.linear.bias);
      if (step.added >= 0) {
        const auto* added = static_cast<const Stored*>(args.added.data) + r0 * width * out_channels;
        run(AddResidual<Stored>{bias, added, out_channels});
      } else {
        with_activation(step.activation, bias, step.slopes, run);
      }
    });
  }
  void change(const PointwiseStep& step, const Stored* x, int64_t positions, int64_t channels,
              Stored* out) const {
    const float *factor = args.state + step.affine, *summand = factor + channels;
    for (int64_t p = 0; p < positions; ++p, x += channels, out += channels) {
      for (int64_t c = 0; c < channels; c += kLanes<float>) {
        const vec<float> value = load(x + c) * load(factor + c) + load(summand + c);
        store(out + c, step.affine_gelu ? gelu(value) : value);
      }
    }
  }

  // The same with a kernel and a stride that are known only now.
  template <class... Args>
  void depthwise_of(int64_t kernel, int64_t stride, Args... rest) const {
    if (kernel == 7) return MapTasks::depthwise_of<7, 1>(rest...);
    if (kernel == 5) {
      return stride == 1 ? MapTasks::depthwise_of<5, 1>(rest...) : MapTasks::depthwise_of<5, 2>(rest...);
    }
    stride == 1 ? MapTasks::depthwise_of<3, 1>(rest...) : MapTasks::depthwise_of<3, 2>(rest...);
  }

  void depthwise(const DepthwiseStep& step, int64_t begin, int64_t end) {
    const int64_t channels = padded(step.in_channels), row = (args.in.width + 2) * channels;
    const auto space = room<1>({step.kernel == 5 && step.stride == 2 ? 6 * row : row});
    memset(space.part[0], 0, row * sizeof(Stored));
    const float* taps = step.mixed ? place(step.taps) : at(step.taps);
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      for (int64_t r = r0; r < r1; ++r) {
        with_activation(step.activation, at(step.bias), step.slopes, [&](auto epilogue) {
          depthwise_of(step.kernel, step.stride, r, channels, out_channels, taps, space.stored(0), out_row(r),
                       epilogue);
        });
      }
    });
  }

  void inverted(const InvertedStep& step, int64_t begin, int64_t end) {
    const int64_t width = args.out.width, row = width * out_channels, hidden = step.expand.outputs;
    const auto space = room<3>({row, step.kernel > 0 ? args.group * row : 0, args.group * width * hidden});
    memset(space.part[0], 0, row * sizeof(Stored));
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      const Stored *x = in_row(r0, out_channels), *from = x;
      if (step.kernel > 0) {
        for (int64_t r = r0; r < r1; ++r) {
          depthwise_of(step.kernel, 1, r, out_channels, out_channels, at(step.taps), space.stored(0),
                       space.stored(1) + (r - r0) * row, AddBias{at(step.bias)});
        }
        from = space.stored(1);
      }
      const int64_t positions = (r1 - r0) * width;
      gemm(positions, Rows<Stored>{from, out_channels, 1, step.expand.inputs, 0}, matrix(step.expand),
           space.stored(2), hidden, AddBiasGelu{at(step.expand.bias)});
      gemm(positions, Rows<Stored>{space.stored(2), hidden, 1, step.project.inputs, 0}, matrix(step.project),
           out_row(r0), out_channels, AddResidual<Stored>{at(step.project.bias), x, out_channels});
    });
  }

  void attention(const AttentionStep& step, int64_t begin, int64_t end) const {
    const int64_t pixels = args.in.height * args.in.width, tiles = blocks_of(pixels, kAttentionTile);
    const int64_t pixel = 2 * padded(step.depth) + 2 * out_channels;
    WindowAttention window(pixels, step.depth, made.channels, step.outside);
    const auto space = room<1>({window.scratch(kAttentionTile)});
    int64_t open = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t index = task / tiles, first = task % tiles * kAttentionTile, rest = pixels - first;
      const int64_t count = rest < kAttentionTile ? rest : kAttentionTile;
      if (index != open) {
        open = index;
        window.open(static_cast<const Stored*>(args.in.data) + index * pixels * pixel, space.part[0]);
      }
      Stored* y = static_cast<Stored*>(args.out.data) + index * pixels * out_channels;
      window.run(first, count, y);
      for (int64_t p = first; p < first + count && made.channels < out_channels; ++p) {
        memset(y + p * out_channels + made.channels, 0, (out_channels - made.channels) * sizeof(Stored));
      }
    }
  }

  void add(const AddStep&, int64_t begin, int64_t end) {
    const auto space = room<1>({0});
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      const Stored* x = in_row(r0, out_channels);
      const Stored* other = static_cast<const Stored*>(args.added.data) + (x - in_row(0, out_channels));
      Stored* out = out_row(r0);
      for (int64_t i = 0; i < (r1 - r0) * args.out.width * out_channels; i += kLanes<float>) {
        store(out + i, load(x + i) + load(other + i));
      }
    });
  }

  // Rows of windows, or of the map that they are put together to.
  void split(const WindowsStep& step, int64_t begin, int64_t end) {
    const int64_t window = step.window, columns = blocks_of(args.in.width, window), pixel = out_channels;
    const auto space = room<1>({0});
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      for (int64_t r = r0; r < r1; ++r) {
        const int64_t index = r / window, y = index / columns * window + r % window;
        const int64_t x = index % columns * window, rest = args.in.width - x;
        const int64_t inside = y >= args.in.height ? 0 : (rest < window ? rest : window);
        const auto* from = static_cast<const Stored*>(args.in.data) + (y * args.in.width + x) * pixel;
        Stored* to = out_row(r);
        memcpy(to, from, inside * pixel * sizeof(Stored));
        memset(to + inside * pixel, 0, (window - inside) * pixel * sizeof(Stored));
      }
    });
  }
  void join(const WindowsStep& step, int64_t begin, int64_t end) {
    const int64_t window = step.window, width = args.out.width, pixel = out_channels;
    const int64_t columns = blocks_of(width, window);
    const auto space = room<1>({0});
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      for (int64_t y = r0; y < r1; ++y) {
        for (int64_t x = 0; x < width; x += window) {
          const int64_t row = (y / window * columns + x / window) * window + y % window;
          const int64_t count = width - x < window ? width - x : window;
          memcpy(out_row(y) + x * pixel, static_cast<const Stored*>(args.in.data) + row * window * pixel,
                 count * pixel * sizeof(Stored));
        }
      }
    });
  }
};

}  // namespace

void map_step(const StepArgs& args, int64_t begin, int64_t end) {
  MapSteps maps(args);
  switch (args.kind) {
    case kImageConv:
      return maps.image_conv(fields_of<ConvStep>(args), begin, end);
    case kDenseConv:
      return maps.dense_conv(fields_of<ConvStep>(args), begin, end);
    case kPointwise:
      return maps.pointwise(fields_of<PointwiseStep>(args), begin, end);
    case kDepthwise:
      return maps.depthwise(fields_of<DepthwiseStep>(args), begin, end);
    case kInverted:
      return maps.inverted(fields_of<InvertedStep>(args), begin, end);
    case kAttention:
      return maps.attention(fields_of<AttentionStep>(args), begin, end);
    case kSplit:
      return maps.split(fields_of<WindowsStep>(args), begin, end);
    case kAdd:
      return maps.add(fields_of<AddStep>(args), begin, end);
    default:
      return maps.join(fields_of<WindowsStep>(args), begin, end);
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
