#include "activation.h"
#include "deployed_attention.h"
#include "map_step.h"

namespace mfk {
namespace MFK_ISA {
namespace {

struct MapSteps : MapTasks {
  using MapTasks::MapTasks;

  // The activation of a step, perhaps with slopes; none where slopes are mixed, see `mix`.
  template <class Step>
  AddBiasActivation activation_of(const Step& step, const float* bias) const {
    if (step.attention >= 0) return {bias, kNoActivation};
    return {bias, step.activation, place(step.slopes), place(step.slopes) + out_channels};
  }

  // An activation that has a pass of its own, of rows that have just been written.
  void pass(int64_t activation, int64_t r0, int64_t r1) const {
    if (has_pass(activation))
      activation_pass(activation, out_row(r0), (r1 - r0) * args.out.width * out_channels);
  }
  // The same, or the activation of a step whose slopes are mixed.
  template <class Step>
  void mix(const Step& step, int64_t r0, int64_t r1) const {
    if (step.attention < 0) return pass(step.activation, r0, r1);
    const int64_t width = args.out.width;
    mixed_slopes(step.activation, step.slopes, step.tokens, out_channels)
        .apply(out_row(r0), r0 * width, (r1 - r0) * width);
  }

  void image_conv(const ConvStep& step, int64_t begin, int64_t end) {
    const int64_t k = step.kernel, channels = step.in_channels;
    const int64_t line = round_up((args.out.width * step.stride + k) * channels, 2);
    const Before before = padding_before(step, args.images->height, args.images->width);
    const auto space = room<1>({k * line});
    Stored* lines = space.stored(0);  // (kernel, pixels, channels)
    memset(lines, 0, k * line * sizeof(Stored));
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      for (int64_t r = r0; r < r1; ++r) {
        // Those that the row before needed, too, are there.
        const int64_t kept = r > r0 && step.stride < k ? k - step.stride : 0;
        memmove(lines, lines + (k - kept) * line, kept * line * sizeof(Stored));
        for (int64_t i = kept; i < k; ++i) {
          image_line(*args.images, channels, args.sample, r * step.stride - before.rows + i,
                     lines + i * line + before.columns * channels);
        }
        convolve(step, args.out.width, Rows<Stored>{lines, step.stride * channels, k, k * channels, line},
                 out_row(r));
      }
      pass(step.activation, r0, r1);
    });
  }
  template <class T>
  void convolve(const ConvStep& step, int64_t positions, Rows<T> x, Stored* out) {
    constexpr bool kStored = std::is_same<T, Stored>::value;
    if constexpr (kStored) {
      if (step.groups > 1 && args.calibration != nullptr) calibrate(positions, x, step.linear);
    }
    const AddBiasActivation epilogue{at(step.linear.bias), step.activation};
    if (step.groups > 1) {
      if constexpr (!kStored || !kBytesAlone) {
        gemm_groups(positions, x, step.groups, Weights{at(step.linear.weight), made.channels, &fetched}, out,
                    out_channels, epilogue);
      }
    } else if constexpr (kStored) {
      product_of_rounded(positions, x, step.linear, out, out_channels, epilogue);
    } else {
      gemm(positions, x, matrix(step.linear), out, out_channels, epilogue);
    }
  }

  // Whole blocks: what is too much is written over by what comes next.
  template <class T>
  static MFK_INLINE void copy_blocks(const T* from, int64_t count, T* to) {
    constexpr int64_t n = 16;
    for (int64_t c = 0; c < count; c += n) memcpy(to + c, from + c, n * sizeof(T));
  }
  // Rows of the input, with zeros around them, are themselves what is multiplied: a pixel's neighbours lie
  // beside it. A task's rows of the output take the panels of weights one pair after the other.
  void direct_conv(const ConvStep& step, int64_t begin, int64_t end) {
    constexpr int64_t kOutputs = 2 * kPanel;
    const int64_t k = step.kernel, channels = step.in_channels, width = args.in.width, s = step.stride;
    const Before before = padding_before(step, args.in.height, width);
    const int64_t used = (args.out.width - 1) * s + k, whole = width + before.columns;
    const int64_t line = (used > whole ? used : whole) * channels;
    const int64_t most = (args.group - 1) * s + k, inputs = weight_rows(k * channels) * k;
    const auto space = room<1>({most * line});
    Stored* lines = space.stored(0);
    memset(lines, 0, most * line * sizeof(Stored));
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      for (int64_t i = 0; i < (r1 - r0 - 1) * s + k; ++i) {
        const Stored* from = in_row(r0, r0 * s + i - before.rows, channels, nullptr);
        Stored* to = lines + i * line + before.columns * channels;
        if (from == nullptr) {
          memset(to, 0, width * channels * sizeof(Stored));
        } else {
          memcpy(to, from, width * channels * sizeof(Stored));
        }
      }
      for (int64_t o = 0; o < step.linear.outputs; o += kOutputs) {
        const int64_t rest = step.linear.outputs - o;
        const Weights weights{at(step.linear.weight) + o * inputs, rest < kOutputs ? rest : kOutputs,
                              &fetched};
        const AddBiasActivation epilogue{at(step.linear.bias) + o, step.activation};
        for (int64_t r = r0; r < r1; ++r) {
          gemm(args.out.width, Rows<Stored>{lines + (r - r0) * s * line, s * channels, k, k * channels, line},
               weights, out_row(r) + o, out_channels, epilogue);
        }
      }
      pass(step.activation, r0, r1);
    });
  }
  // Each output's inputs side by side, then one product.
  void dense_conv(const ConvStep& step, int64_t begin, int64_t end) {
#if MFK_INT8
    if (rounds(step.linear)) return dense_conv_of_bytes(step, begin, end);
#endif
    if (args.calibration == nullptr && is_direct(step, args.in.count)) return direct_conv(step, begin, end);
    const int64_t k = step.kernel, pixel = padded(step.in_channels);
    const int64_t patch = padded(k * k * step.in_channels), width = args.out.width;
    const auto space = room<2>({args.group * width * patch + 16, pixel});
    Stored *patches = space.stored(0), *zeros = space.stored(1);
    const int64_t above = padding_before(step, args.in.height);
    memset(zeros, 0, pixel * sizeof(Stored));
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      convolve_patches<Stored>(step, r0, r1, zeros, patches, [&](int64_t r, int64_t ky) {
        return in_row(r, r % args.out.height * step.stride + ky - above, pixel, nullptr);
      });
    });
  }
#if MFK_INT8
  // The rows that some outputs want are rounded once. Runs of outputs that reach over several windows are cut
  // where these end.
  void dense_conv_of_bytes(const ConvStep& step, int64_t begin, int64_t end) {
    const int64_t k = step.kernel, pixel = padded(step.in_channels), row = args.in.width * pixel;
    const int64_t patch = padded(k * k * step.in_channels), most = (args.group - 1) * step.stride + k;
    const auto space = room<3>(
        {args.group * args.out.width * patch / 4 + 16, pixel / 4, bytes_room(step.linear, most * row)});
    auto part = [&](int i) { return reinterpret_cast<uint8_t*>(space.part[i]); };
    const Bytes bytes(step.linear);
    const int64_t above = padding_before(step, args.in.height);
    memset(part(1), Bytes(step.linear).nothing(), pixel);
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      for (int64_t r = r0, next; r < r1; r = next) {
        const int64_t y = r % args.out.height, window = r / args.out.height * args.in.height;
        next = r1 - r < args.out.height - y ? r1 : r + args.out.height - y;
        int64_t from = y * step.stride - above, until = (y + next - r - 1) * step.stride - above + k;
        from = from < 0 ? 0 : from;
        until = until < args.in.height ? until : args.in.height;
        bytes.round(in_row(window + from, pixel), (until - from) * row, part(2));
        convolve_patches<uint8_t>(step, r, next, part(1), part(0), [&](int64_t at, int64_t ky) {
          const int64_t line = at % args.out.height * step.stride + ky - above;
          return line < from || line >= until ? static_cast<uint8_t*>(nullptr)
                                              : part(2) + (line - from) * row;
        });
      }
    });
  }
#endif
  // `input(r, ky)`: the row of the input that output row r wants for a row of the kernel, or null.
  template <class T, class Input>
  void convolve_patches(const ConvStep& step, int64_t r0, int64_t r1, const T* zeros, T* patches,
                        Input input) {
    const int64_t k = step.kernel, channels = step.in_channels, pixel = padded(channels);
    const int64_t inputs = k * k * channels, patch = padded(inputs), width = args.out.width;
    const int64_t before = padding_before(step, args.in.width);
    T* to = patches;
    for (int64_t r = r0; r < r1; ++r) {
      const T* rows[16];
      for (int64_t ky = 0; ky < k; ++ky) rows[ky] = input(r, ky);
      for (int64_t x = 0; x < width; ++x, to += patch) {
        const int64_t left = x * step.stride - before;
        T* tap = to;
        for (int64_t ky = 0; ky < k; ++ky) {
          const T* row = rows[ky] == nullptr ? nullptr : rows[ky] + left * pixel;
          if (row != nullptr && left >= 0 && left + k <= args.in.width && channels == pixel) {
            copy_blocks(row, k * channels, tap);
            tap += k * channels;
            continue;
          }
          for (int64_t kx = 0; kx < k; ++kx, tap += channels) {
            const bool inside = row != nullptr && left + kx >= 0 && left + kx < args.in.width;
            copy_blocks(inside ? row + kx * pixel : zeros, channels, tap);
          }
        }
        memset(tap, 0, (patch - inputs) * sizeof(T));
      }
    }
    const Rows<T> of_groups{patches, patch, k * k, channels, channels}, whole{patches, patch, 1, inputs, 0};
    convolve(step, (r1 - r0) * width, step.groups > 1 ? of_groups : whole, out_row(r0));
    pass(step.activation, r0, r1);
  }

  void pointwise(const PointwiseStep& step, int64_t begin, int64_t end) {
    const int64_t channels = padded(step.in_channels), width = args.out.width;
    const bool changed = step.affine >= 0;
    const int64_t most = args.group * width * channels;
    const auto space = room<2>({changed ? most : 0, bytes_room(step.linear, most)});
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
          const Weights matrix{weights, made.channels, &fetched};
          if (args.calibration != nullptr) calibrate(positions, rows, step.linear);
#if MFK_INT8
          if (rounds(step.linear)) {
            auto* bytes = reinterpret_cast<uint8_t*>(space.part[1]);
            Bytes(step.linear).round(x, positions * channels, bytes);
            return gemm_groups(positions, Rows<uint8_t>{bytes, channels, 1, step.in_channels, 0}, step.groups,
                               matrix, out, out_channels, epilogue);
          }
#endif
          if constexpr (!kBytesAlone) {
            gemm_groups(positions, rows, step.groups, matrix, out, out_channels, epilogue);
          }
        } else if (kBytesAlone || !step.mixed) {
          product(positions, rows, step.linear, space.part[1], out, out_channels, epilogue);
        } else if constexpr (!kBytesAlone) {
          gemm(positions, rows, Weights{weights, step.linear.outputs, &fetched}, out, out_channels, epilogue);
        }
      };
      const float* bias = at(step.linear.bias);
      if (step.added >= 0) {
        const auto* added = static_cast<const Stored*>(args.added.data) + r0 * width * out_channels;
        run(AddResidual<Stored>{bias, added, out_channels});
      } else {
        run(activation_of(step, bias));
        mix(step, r0, r1);
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
  void depthwise_of(int64_t kernel, int64_t stride, Before before, Args... rest) const {
    const bool half = before.rows == kernel / 2 && before.columns == kernel / 2;
    const bool small = kernel == 3 || kernel == 5;
    if (!(stride == 1 && half && (small || kernel == 7)) && !(stride == 2 && small)) {
      return any_depthwise_of(kernel, stride, before, rest...);
    }
    if (kernel == 7) return MapTasks::depthwise_of<7, 1>(rest...);
    if (stride == 1) {
      return kernel == 5 ? MapTasks::depthwise_of<5, 1>(rest...) : MapTasks::depthwise_of<3, 1>(rest...);
    }
    kernel == 5 ? MapTasks::depthwise_of<5, 2>(rest..., before)
                : MapTasks::depthwise_of<3, 2>(rest..., before);
  }

  // One output after the other, for kernels that networks rarely have.
  template <class Epilogue>
  void any_depthwise_of(int64_t kernel, int64_t stride, Before before, int64_t r, int64_t channels,
                        int64_t hidden, const float* taps, Stored*, Stored* out, Epilogue epilogue) const {
    const int64_t top = r % args.out.height * stride - before.rows;
    for (int64_t x = 0; x < args.out.width; ++x, out += hidden) {
      const int64_t left = x * stride - before.columns, rest = args.in.width - left;
      const int64_t from = left < 0 ? -left : 0, to = rest < kernel ? rest : kernel;
      for (int64_t c = 0, in = 0; c < hidden; c += kLanes<float>, in += kLanes<float>) {
        if (in == channels) in = 0;
        vec<float> sum{};
        for (int64_t ky = 0; ky < kernel; ++ky) {
          const Stored* row = in_row(r, top + ky, channels, nullptr);
          if (row == nullptr) continue;
          for (int64_t kx = from; kx < to; ++kx) {
            sum += load(row + (left + kx) * channels + in) * load(taps + (ky * kernel + kx) * hidden + c);
          }
        }
        with_finish(epilogue, c, [&](auto finish) __attribute__((always_inline)) {
          store(out + c, finish.activate(sum + finish.bias));
        });
      }
    }
  }

  void depthwise(const DepthwiseStep& step, int64_t begin, int64_t end) {
    const int64_t channels = padded(step.in_channels), row = (args.in.width + 4) * channels;
    const Before before = padding_before(step, args.in.height, args.in.width);
    const auto space = room<1>({step.kernel == 5 && step.stride == 2 ? 6 * row : row});
    memset(space.part[0], 0, row * sizeof(Stored));
    const float* taps = step.mixed ? place(step.taps) : at(step.taps);
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      for (int64_t r = r0; r < r1; ++r) {
        depthwise_of(step.kernel, step.stride, before, r, channels, out_channels, taps, space.stored(0),
                     out_row(r), activation_of(step, at(step.bias)));
      }
      mix(step, r0, r1);
    });
  }

  void inverted(const InvertedStep& step, int64_t begin, int64_t end) {
    const int64_t width = args.out.width, row = width * out_channels, hidden = step.expand.outputs;
    const Before half{step.kernel / 2, step.kernel / 2};
    const auto space = room<4>({row, step.kernel > 0 ? args.group * row : 0, args.group * width * hidden,
                                bytes_room(step.expand, args.group * row)});
    memset(space.part[0], 0, row * sizeof(Stored));
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      const Stored *x = in_row(r0, out_channels), *from = x;
      if (step.kernel > 0) {
        for (int64_t r = r0; r < r1; ++r) {
          depthwise_of(step.kernel, 1, half, r, out_channels, out_channels, at(step.taps), space.stored(0),
                       space.stored(1) + (r - r0) * row, AddBias{at(step.bias)});
        }
        from = space.stored(1);
      }
      const int64_t positions = (r1 - r0) * width;
      product_for(step.project, positions, Rows<Stored>{from, out_channels, 1, step.expand.inputs, 0},
                  step.expand, space.part[3], space.part[2], hidden, AddBiasGelu{at(step.expand.bias)});
      product_of_rounded(positions, Rows<Stored>{space.stored(2), hidden, 1, step.project.inputs, 0},
                         step.project, out_row(r0), out_channels,
                         AddResidual<Stored>{at(step.project.bias), x, out_channels});
    });
  }

  void attention(const AttentionStep& step, int64_t begin, int64_t end) const {
    const int64_t pixels = args.in.height * args.in.width, tiles = blocks_of(pixels, kAttentionTile);
    const int64_t pixel = attention_pixel(step), channels = padded(step.channels);
    WindowAttention window(pixels, step);
    const auto space = room<1>({window.scratch(kAttentionTile)});
    int64_t open = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t index = task / tiles, first = task % tiles * kAttentionTile, rest = pixels - first;
      const int64_t count = rest < kAttentionTile ? rest : kAttentionTile;
      const int64_t start = index / step.heads * pixels, head = index % step.heads;
      if (index != open) {
        open = index;
        window.open(static_cast<const Stored*>(args.in.data) + start * pixel, head, space.part[0]);
      }
      Stored* y = static_cast<Stored*>(args.out.data) + start * out_channels + head * channels;
      window.run(first, count, y, out_channels);
      for (int64_t p = first; p < first + count && step.channels < channels; ++p) {
        memset(y + p * out_channels + step.channels, 0, (channels - step.channels) * sizeof(Stored));
      }
    }
  }

  void add(const AddStep& step, int64_t begin, int64_t end) {
    const auto space = room<1>({kLanes<float>});
    memset(space.part[0], 0, kLanes<float> * sizeof(float));
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      const Stored* x = in_row(r0, out_channels);
      const Stored* other = static_cast<const Stored*>(args.added.data) + (x - in_row(0, out_channels));
      Stored* out = out_row(r0);
      with_finish(AddBiasActivation{space.part[0], step.activation}, 0, [&](auto finish) {
        for (int64_t i = 0; i < (r1 - r0) * args.out.width * out_channels; i += kLanes<float>) {
          const vec<float> a = load(x + i), b = load(other + i);
          store(out + i, finish.activate(step.maximum ? maximum(a, b) : a + b));
        }
      });
      pass(step.activation, r0, r1);
    });
  }

  void max_pool(const MaxPoolStep& step, int64_t begin, int64_t end) {
    const Before before = padding_before(step, args.in.height, args.in.width);
    const auto space = room<1>({0});
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      for (int64_t r = r0; r < r1; ++r) {
        const int64_t top = r % args.out.height * step.stride - before.rows, below = top + step.kernel;
        const int64_t y0 = top < 0 ? 0 : top, y1 = below < args.in.height ? below : args.in.height;
        Stored* out = out_row(r);
        for (int64_t x = 0; x < args.out.width; ++x, out += out_channels) {
          const int64_t left = x * step.stride - before.columns, right = left + step.kernel;
          const int64_t x0 = left < 0 ? 0 : left, x1 = right < args.in.width ? right : args.in.width;
          for (int64_t c = 0; c < out_channels; c += kLanes<float>) {
            vec<float> most = splat(-__builtin_inff());
            for (int64_t y = y0; y < y1; ++y) {
              const Stored* row = in_row(r, y, out_channels, nullptr) + c;
              for (int64_t i = x0; i < x1; ++i) most = maximum(most, load(row + i * out_channels));
            }
            store(out + c, most);
          }
        }
      }
    });
  }

  void norm(const MapNormStep& step, int64_t begin, int64_t end) {
    constexpr int64_t n = kLanes<float>;
    const auto space = room<1>({0});
    const double eps = from_bits(step.eps), absent = static_cast<double>(out_channels - made.channels);
    const float *gamma = at(step.gamma), *beta = at(step.beta);
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      const Stored* x = in_row(r0, out_channels);
      Stored* out = out_row(r0);
      for (int64_t p = 0; p < (r1 - r0) * args.out.width; ++p, x += out_channels, out += out_channels) {
        vec<float> sums{}, squares{};
        for (int64_t c = 0; c < out_channels; c += n) sums += load(x + c);
        const float mean = static_cast<float>(sum_lanes<float>(sums) / made.channels);
        for (int64_t c = 0; c < out_channels; c += n) {
          const vec<float> off = load(x + c) - mean;
          squares += off * off;
        }
        // The padding, too, was `mean` off.
        const double variance = (sum_lanes<float>(squares) - absent * (double{mean} * mean)) / made.channels;
        const float scale = static_cast<float>(1 / __builtin_sqrt((variance > 0 ? variance : 0) + eps));
        for (int64_t c = 0; c < out_channels; c += n) {  // gamma and beta are zero in the padding
          store(out + c, (load(x + c) - mean) * scale * load(gamma + c) + load(beta + c));
        }
      }
    });
  }

  void weigh(const WeighStep& step, int64_t begin, int64_t end) {
    const int64_t inputs = step.in_channels, columns = padded(step.tokens), width = args.in.width;
    const auto space =
        room<3>({weight_rows(inputs) * columns, inputs * kPanel, (step.stride + 1) * width * columns});
    float *matrix = space.part[0], *logits = space.part[2];
    pack_queries(step, matrix, space.part[1]);
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      for (int64_t r = r0; r < r1; ++r) {
        // What adaptive pooling takes the mean of: one row more than the stride at most.
        const int64_t height = args.in.height, y0 = r * height / args.out.height;
        const int64_t y1 = blocks_of((r + 1) * height, args.out.height);
        gemm((y1 - y0) * width, Rows<Stored>{in_row(y0, padded(inputs)), padded(inputs), 1, inputs, 0},
             Weights{matrix, columns}, logits, columns, AsSummed{});
        float* out = static_cast<float*>(args.out.data) + r * args.out.width * columns;
        for (int64_t x = 0; x < args.out.width; ++x, out += columns) {
          const int64_t x0 = x * width / args.out.width, x1 = blocks_of((x + 1) * width, args.out.width);
          softmax_of_means(logits + x0 * columns, y1 - y0, x1 - x0, width * columns, step.tokens, out);
        }
      }
    });
  }
  struct AsSummed {
    struct At {
      vec<float> bias;
      MFK_INLINE vec<float> operator()(vec<float> y, int64_t) const { return y; }
    };
    MFK_INLINE At at(int64_t) const { return {vec<float>{}}; }
  };
  // Queries of all heads as a matrix that makes the mean of their logits; `tile` holds (inputs, 16).
  void pack_queries(const WeighStep& step, float* matrix, float* tile) const {
    const int64_t inputs = step.in_channels;
    const float share = 1.0f / step.heads;
    for (int64_t t = 0; t < step.tokens; t += kPanel) {
      memset(tile, 0, inputs * kPanel * sizeof(float));
      const int64_t count = step.tokens - t < kPanel ? step.tokens - t : kPanel;
      for (int64_t j = 0; j < count; ++j) {
        const float* query = place(step.queries) + (t + j) * step.row;
        for (int64_t i = 0; i < inputs; ++i) tile[i * kPanel + j] = query[i];
      }
      pack_panel(matrix + t * weight_rows(inputs), inputs,
                 [&](int64_t i, int64_t j) { return load(tile + i * kPanel + j) * share; });
    }
  }
  // Of the means of some rows and columns of logits.
  static void softmax_of_means(const float* logits, int64_t rows, int64_t columns, int64_t row,
                               int64_t tokens, float* out) {
    constexpr int64_t n = kLanes<float>;
    const int64_t width = padded(tokens);
    const float share = 1.0f / (rows * columns);
    vec<float> tops = splat(-__FLT_MAX__), sums{};
    for (int64_t t = 0; t < width; t += n) {
      vec<float> sum{};
      for (int64_t y = 0; y < rows; ++y) {
        for (int64_t x = 0; x < columns; ++x) sum += load(logits + y * row + x * width + t);
      }
      sum *= share;
      if (t + n > tokens) sum = first_lanes<float>(tokens - t) ? sum : splat(-__FLT_MAX__);
      store(out + t, sum);
      tops = larger(sum, tops);
    }
    const float top = max_lanes<float>(tops);
    for (int64_t t = 0; t < width; t += n) {
      const vec<float> weight = exp_nonpositive(load(out + t) - top);
      store(out + t, weight);
      sums += weight;
    }
    const float norm = static_cast<float>(1 / sum_lanes<float>(sums));
    for (int64_t t = 0; t < width; t += n) store(out + t, load(out + t) * norm);
  }

  void spread(const SpreadStep& step, int64_t begin, int64_t end) {
    constexpr int64_t n = kLanes<float>;
    const auto space = room<1>({out_channels});
    float* inside = space.part[0];  // 1, but 0 in the padding
    for (int64_t c = 0; c < out_channels; ++c) inside[c] = c < made.channels ? 1.0f : 0.0f;
    const float* values = place(step.values);
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      const Stored* x = in_row(r0, out_channels);
      Stored* out = out_row(r0);
      for (int64_t p = r0 * args.out.width; p < r1 * args.out.width;
           ++p, x += out_channels, out += out_channels) {
        const float* weights = at(step.weights) + p * step.tokens;
        const float bias = at(step.bias)[p];
        for (int64_t c = 0; c < out_channels; c += n) {
          vec<float> sum = load(inside + c) * bias;
          for (int64_t t = 0; t < step.tokens; ++t) sum += load(values + t * step.row + c) * weights[t];
          store(out + c, load(x + c) + sum);
        }
      }
    });
  }

  // Rows of windows, or of the map that they are put together to.
  void split(const WindowsStep& step, int64_t begin, int64_t end) {
    const int64_t window = step.window, columns = blocks_of(args.in.width, window), pixel = out_channels;
    const int64_t windows = blocks_of(args.in.height, window) * columns;  // of a map, or of a window
    const auto space = room<1>({0});
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      for (int64_t r = r0; r < r1; ++r) {
        const int64_t cut = r / window / windows, index = r / window % windows;
        const int64_t y = index / columns * window + r % window;
        const int64_t x = index % columns * window, rest = args.in.width - x;
        const int64_t inside = y >= args.in.height ? 0 : (rest < window ? rest : window);
        const Stored* from = in_row(cut * args.in.height + y, pixel) + x * pixel;
        Stored* to = out_row(r);
        memcpy(to, from, inside * pixel * sizeof(Stored));
        memset(to + inside * pixel, 0, (window - inside) * pixel * sizeof(Stored));
      }
    });
  }
  void join(const WindowsStep& step, int64_t begin, int64_t end) {
    const int64_t window = step.window, width = args.out.width, pixel = out_channels;
    const int64_t columns = blocks_of(width, window);
    const int64_t windows = blocks_of(args.out.height, window) * columns;  // of a map, or of a window
    const auto space = room<1>({0});
    for_tasks(begin, end, space.last(), [&](int64_t r0, int64_t r1) {
      for (int64_t r = r0; r < r1; ++r) {
        const int64_t first = r / args.out.height * windows, y = r % args.out.height;
        for (int64_t x = 0; x < width; x += window) {
          const int64_t row = (first + y / window * columns + x / window) * window + y % window;
          const int64_t count = width - x < window ? width - x : window;
          memcpy(out_row(r) + x * pixel, static_cast<const Stored*>(args.in.data) + row * window * pixel,
                 count * pixel * sizeof(Stored));
        }
      }
    });
  }
};

}  // namespace

void map_step(const StepArgs& args, int64_t begin, int64_t end) {
  MapSteps maps(args);
#if MFK_INT8
  if constexpr (kBytesAlone) {
    if (args.kind == kDenseConv) return maps.dense_conv_of_bytes(fields_of<ConvStep>(args), begin, end);
    if (args.kind == kPointwise) return maps.pointwise(fields_of<PointwiseStep>(args), begin, end);
    return maps.inverted(fields_of<InvertedStep>(args), begin, end);
  }
#endif
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
    case kMapNorm:
      return maps.norm(fields_of<MapNormStep>(args), begin, end);
    case kSpread:
      return maps.spread(fields_of<SpreadStep>(args), begin, end);
    case kMaxPool:
      return maps.max_pool(fields_of<MaxPoolStep>(args), begin, end);
    case kWeigh:
      return maps.weigh(fields_of<WeighStep>(args), begin, end);
    default:
      return maps.join(fields_of<WindowsStep>(args), begin, end);
  }
}

}  // namespace MFK_ISA
}  // namespace mfk
