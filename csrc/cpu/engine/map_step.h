// What all steps of a deployed network that write a map have in common.
#pragma once

#include "bridge.h"
#include "bytes.h"
#include "deployed_plan.h"
#include "depthwise.h"
#include "map_rows.h"

namespace mfk {
namespace MFK_ISA {

// Where there are instructions for bytes, steps whose matrices are int8 alone; elsewhere all steps.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool kBytesAlone = true;
#else
constexpr bool kBytesAlone = false;
#endif

// A dynamic ReLU whose slopes are other ones at each position, those of the tokens mixed; or relu6 and a
// factor.
struct MixedSlopes {
  // How many positions share a read of the slopes.
  static constexpr int kTogether = MFK_VECTOR_REGISTERS == 32 ? 8 : 4;
  const float* slopes;  // (tokens, 2, channels)
  int64_t tokens, channels;
  const float* weights;  // of the tokens, by position; padded
  bool relu6_first;

  // In place, from position `first` of the map on.
  template <class T>
  void apply(T* x, int64_t first, int64_t positions) const {
    const int64_t row = padded(tokens);
    for (int64_t p = 0; p < positions; p += kTogether) {
      const int64_t rest = positions - p;
      with_constant<kTogether>(rest < kTogether ? rest : kTogether, [&](auto count) {
        some<decltype(count)::value>(x + p * channels, weights + (first + p) * row, row);
      });
    }
  }

 private:
  template <int kCount, class T>
  __attribute__((noinline)) void some(T* x, const float* weight, int64_t row) const {
    for (int64_t c = 0; c < channels; c += kLanes<float>) {
      vec<float> a[kCount] = {}, b[kCount] = {};
      const float* of_token = slopes + c;
      for (int64_t t = 0; t < tokens; ++t, of_token += 2 * channels) {
        const vec<float> first = load(of_token), second = load(of_token + channels);
        unrolled<kCount>([&](auto i) __attribute__((always_inline)) {
          const vec<float> share = splat(weight[i * row + t]);
          a[i] += share * first;
          b[i] += share * second;
        });
      }
      unrolled<kCount>([&](auto i) __attribute__((always_inline)) {
        T* at = x + i * channels + c;
        const vec<float> y = load(at);
        store(at, relu6_first ? a[i] * relu6(y) : larger(a[i] * y, b[i] * y));
      });
    }
  }
};

// One call: some tasks of a step, one after the other.
struct MapTasks {
  const StepArgs& args;
  const MapOut& made;
  const int64_t out_channels;  // padded
  Bridge bridge;
  Fetched fetched{};

  explicit MapTasks(const StepArgs& a)
      : args(a),
        made(fields_of<MapOut>(a)),
        out_channels(padded(made.channels)),
        bridge(made.channels, out_channels, made.heads > 0 ? made.heads : 1, made.tokens, made.row) {}

  const float* at(int64_t offset) const { return args.weights + offset; }
  const float* place(int64_t offset) const { return args.state + offset; }
  Weights matrix(const PlanLinear& linear) { return Weights{at(linear.weight), linear.outputs, &fetched}; }
  Stored* out_row(int64_t row) const {
    return static_cast<Stored*>(args.out.data) + row * args.out.width * out_channels;
  }
  // A row of the input, counted over all windows.
  const Stored* in_row(int64_t row, int64_t channels) const {
    return static_cast<const Stored*>(args.in.data) + row * args.in.width * channels;
  }
  // Row y of the window that output row `r` is in; `zeros` outside of it.
  const Stored* in_row(int64_t r, int64_t y, int64_t channels, const Stored* zeros) const {
    if (y < 0 || y >= args.in.height) return zeros;
    return in_row(r / args.out.height * args.in.height + y, channels);
  }

  MixedSlopes mixed_slopes(int64_t activation, int64_t slopes, int64_t tokens, int64_t channels) const {
    return {place(slopes), tokens, channels, static_cast<const float*>(args.attention.data),
            activation == kScaledRelu6};
  }

  // Row `r` of the output of a depthwise convolution; `zeros` are a row of the input, of four pixels more for
  // 5x5 kernels of stride 2, after which room for five such rows follows. `before` are half of the kernel,
  // or less with stride 2.
  template <int kSize, int kStride, class Out, class Epilogue>
  void depthwise_of(int64_t r, int64_t channels, int64_t hidden, const float* taps, Stored* zeros, Out* out,
                    Epilogue epilogue, Before before = {kSize / 2, kSize / 2}) const {
    constexpr bool kCopied = kSize == 5 && kStride == 2;
    const int64_t width = args.in.width, row = (width + 4) * channels;
    const Stored* rows[kSize];
    for (int ky = 0; ky < kSize; ++ky) {
      rows[ky] = in_row(r, r % args.out.height * kStride + ky - before.rows, channels, zeros);
      if constexpr (kCopied) {
        Stored* copy = zeros + (ky + 1) * row;
        const int64_t from = before.columns * channels, to = from + width * channels;
        memset(copy, 0, from * sizeof(Stored));
        memcpy(copy + from, rows[ky], width * channels * sizeof(Stored));
        memset(copy + to, 0, (row - to) * sizeof(Stored));
        rows[ky] = copy;
      }
    }
    depthwise_row<kSize, kStride>(rows, kCopied ? width + 4 : width, args.out.width, channels, taps, out,
                                  epilogue, hidden, kCopied ? 0 : before.columns);
  }

  // Whether a product's inputs are rounded to bytes.
  static bool rounds(const PlanLinear& linear) { return kBytesAlone || (MFK_INT8 && linear.scale != 0); }
  // Floats that hold so many inputs as bytes, where they are rounded.
  static int64_t bytes_room(const PlanLinear& linear, int64_t inputs) {
    return rounds(linear) ? blocks_of(inputs, 4) + 16 : 0;
  }
  // The product of so many positions with a matrix; `bytes` is room for all of their inputs, see bytes_room.
  template <class Out, class Epilogue>
  void product(int64_t positions, Rows<Stored> x, const PlanLinear& linear, [[maybe_unused]] float* bytes,
               Out* out, int64_t stride, Epilogue epilogue) {
    if (args.calibration != nullptr) calibrate(positions, x, linear);
#if MFK_INT8
    if (rounds(linear)) {
      auto* rounded = reinterpret_cast<uint8_t*>(bytes);
      Bytes(linear).round(x.data, positions * x.position, rounded);
      return gemm(positions, Rows<uint8_t>{rounded, x.position, x.runs, x.run, x.skip}, matrix(linear), out,
                  stride, epilogue);
    }
#endif
    if constexpr (!kBytesAlone) gemm(positions, x, matrix(linear), out, stride, epilogue);
  }
  // The same with an output that is the input of a second product: as bytes where that one wants them.
  template <class Epilogue>
  void product_for([[maybe_unused]] const PlanLinear& second, int64_t positions, Rows<Stored> x,
                   const PlanLinear& linear, float* bytes, float* out, int64_t stride, Epilogue epilogue) {
#if MFK_INT8
    if (rounds(second)) {
      return product(positions, x, linear, bytes, reinterpret_cast<uint8_t*>(out), stride,
                     Rounded<Epilogue>{epilogue, Bytes(second)});
    }
#endif
    if constexpr (!kBytesAlone) {
      product(positions, x, linear, bytes, reinterpret_cast<Stored*>(out), stride, epilogue);
    }
  }
  // A product whose inputs are bytes already where it wants them.
  template <class Out, class Epilogue>
  void product_of_rounded(int64_t positions, Rows<Stored> x, const PlanLinear& linear, Out* out,
                          int64_t stride, Epilogue epilogue) {
#if MFK_INT8
    if (rounds(linear)) {
      const auto* bytes = reinterpret_cast<const uint8_t*>(x.data);
      return gemm(positions, Rows<uint8_t>{bytes, x.position, x.runs, x.run, x.skip}, matrix(linear), out,
                  stride, epilogue);
    }
#endif
    if constexpr (!kBytesAlone) product(positions, x, linear, nullptr, out, stride, epilogue);
  }
  void calibrate(int64_t positions, Rows<float> x, const PlanLinear& linear) const {
    if (linear.scale != 0 || linear.zero == 0) return;
    const Calibration& all = *args.calibration;
    const int64_t number = linear.zero - 1, numbers = all.bins > 0 ? all.bins : 2;
    if (number >= all.products) return;
    const Finding finding{all.ranges + 2 * number, all.found + numbers * number, all.bins};
    for (int64_t p = 0; p < positions; ++p) {
      for (int64_t r = 0; r < x.runs; ++r) finding.add(x.data + p * x.position + r * x.skip, x.run);
    }
  }
  void calibrate(int64_t, Rows<bf16>, const PlanLinear&) const {}  // there is none in bfloat16

  // Working memory in parts, of so many floats each; the last is for `finish`.
  template <int kParts>
  struct Room {
    Buffer<float> memory;
    float* part[kParts + 1];
    Room(const int64_t (&floats)[kParts], int64_t last) : memory(total(floats) + last + 16) {
      part[0] = memory;
      for (int i = 0; i < kParts; ++i) part[i + 1] = part[i] + round_up(floats[i], 16);
    }
    static int64_t total(const int64_t (&floats)[kParts]) {
      int64_t all = 0;
      for (int64_t count : floats) all += round_up(count, 16);
      return all;
    }
    Stored* stored(int i) const { return reinterpret_cast<Stored*>(part[i]); }
    float* last() const { return part[kParts]; }
  };
  template <int kParts>
  Room<kParts> room(const int64_t (&floats)[kParts]) const {
    return {floats, made.heads > 0 ? bridge.scratch(args.group * args.out.width) : 0};
  }

  // Calls f(r0, r1) for each task's rows, and then does what the next steps want of them.
  template <class F>
  void for_tasks(int64_t begin, int64_t end, float* scratch, F f) {
    const int64_t rows = args.out.count * args.out.height;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t r0 = task * args.group, r1 = r0 + args.group < rows ? r0 + args.group : rows;
      fetch_share(r0, r1, rows);
      f(r0, r1);
      finish(args.records + task * record_size(made), out_row(r0), (r1 - r0) * args.out.width, scratch);
    }
  }

  // Of the weights that are read next the share of some rows: what their products fetch meanwhile.
  void fetch_share(int64_t r0, int64_t r1, int64_t rows) {
    const int64_t floats = args.next_end - args.next,
                  steps = args.products / (kOutputVectors * kLanes<float> * kPositions);
    const int64_t pace = blocks_of(floats * sizeof(float), steps + 1);
    fetched = {reinterpret_cast<const char*>(at(args.next + floats * r0 / rows)),
               reinterpret_cast<const char*>(at(args.next + floats * r1 / rows)), pace < 64 ? pace : 64};
  }

  void finish(double* record, Stored* x, int64_t positions, float* scratch) {
    if (made.heads > 0) {
      bridge.open(x, positions, scratch);
      if (made.scatter >= 0) bridge.scatter(x, place(made.scatter), place(made.scatter) + out_channels);
      if (made.gather >= 0) bridge.gather(place(made.gather), record);
    }
    if (made.sums > 0) add_up(record + gathered_size(made), x, positions);
  }

  // Each channel's sum, and its sum of squares, of runs whose lengths are powers of two: of each run the mean
  // m and the squares of what is off it in float, all else in double. So variances keep their digits where
  // means are large: they take these m as they are.
  void add_up(double* sums, const Stored* x, int64_t positions) const {
    constexpr int64_t n = kLanes<float>;
    for (int64_t c = 0; c < out_channels; c += n) {
      WideSum<float> total, squares;
      for (int64_t p = 0, run = 32; p < positions; p += run) {
        while (run > positions - p) run /= 2;
        const Stored* first = x + p * out_channels + c;
        vec<float> sum{}, off{};
        for (int64_t i = 0; i < run; ++i) sum += load(first + i * out_channels);
        total.add(sum);
        if (made.sums < 2) continue;
        const vec<float> mean = sum * (1.0f / run);
        for (int64_t i = 0; i < run; ++i) {
          const vec<float> value = load(first + i * out_channels) - mean;
          off += value * value;
        }
        squares.add(off);
        squares.add_square(mean, run);
      }
      total.store_upto(sums + c, n);
      if (made.sums > 1) squares.store_upto(sums + out_channels + c, n);
    }
  }
};

}  // namespace MFK_ISA
}  // namespace mfk
