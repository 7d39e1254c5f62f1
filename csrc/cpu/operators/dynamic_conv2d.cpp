#include "dynamic_conv2d.h"

#include "dynamic_kernels.h"
#include "dynamic_planes.h"
#include "pointwise.h"

namespace mfk {
namespace MFK_ISA {
namespace {

constexpr int64_t kWholeMap = 262144;

template <class T>
void forward(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t taps = args.kernel_h * args.kernel_w, depth = args.inputs * taps;
  const int64_t out_blocks = blocks_of(args.outputs, args.out_block);
  const int64_t row_blocks = blocks_of(args.out_height, args.rows);
  const int64_t group_blocks = blocks_of(args.groups, args.group_block);
  const int64_t most_rows = least(args.rows, args.out_height),
                most_outputs = args.group_block * args.out_block;
  // All rows of a map at once where they stay in the second-level cache: then they are copied once for all
  // outputs.
  const Planes widest(args, most_rows), all(args, args.out_height);
  const bool whole = all.size<C>(args.group_block * args.inputs) <= kWholeMap;
  Buffer<C> planes((whole ? all : widest).size<C>(args.group_block * args.inputs));
  Buffer<C> row(args.group_block * args.inputs * round_up(args.width, kLanes<C>));
  Buffer<C> kernel(args.out_block * depth), y(most_outputs * widest.run<C>());
  Buffer<int64_t> places(depth);
  int64_t filled = -1, mixed = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t r = task % row_blocks * args.rows, outer = task / row_blocks;
    const int64_t o = outer % out_blocks * args.out_block, sample = outer / out_blocks;
    const int64_t b = sample / group_blocks, g = sample % group_blocks * args.group_block;
    const int64_t groups = least(args.group_block, args.groups - g),
                  outputs = least(args.out_block, args.outputs - o);
    const Planes shape(args, least(args.rows, args.out_height - r));
    const int64_t run = shape.run<C>();
    const Planes& held = whole ? all : shape;
    const int64_t wanted = whole ? sample : sample * row_blocks + task % row_blocks;
    if (wanted != filled) {
      held.fill<T>(b, g * args.inputs, groups * args.inputs, whole ? 0 : r, static_cast<C*>(planes),
                   static_cast<C*>(row));
      for (int64_t i = 0; i < depth; ++i) {
        places[i] = i / taps * held.channel + held.tap(i % taps / args.kernel_w, i % args.kernel_w);
      }
      filled = wanted;
    }
    const C* first_pixel = planes + (whole ? r * held.columns : 0);
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t first = (g + i) * args.outputs + o;
      C* out = y + i * outputs * run;
      // The row blocks of a single group's outputs share their kernels.
      if (groups > 1 || outer != mixed) mix<1, T>(args, b, 1, first, outputs, depth, static_cast<C*>(kernel));
      mixed = outer;
      multiply<256, C, C>(out, run, outputs, Matrix<C>{kernel, depth, 1}, depth,
                          RowsAt<C>{first_pixel + i * args.inputs * held.channel, places}, run);
      for (int64_t j = 0; j < outputs; ++j) {
        const C bias = mixed_bias<T, C>(args, b, first + j);
        C* line = out + j * run;
        for (int64_t k = 0; k < shape.rows; ++k) {  // closes the gaps between the rows
          for (int64_t p = 0; p < args.out_width; ++p) {
            line[k * args.out_width + p] = line[k * shape.columns + p] + bias;
          }
        }
      }
    }
    store_tile<T>(args.y.as<T>(), b, g * args.outputs + o, groups * outputs, r * args.out_width,
                  shape.rows * args.out_width, static_cast<C*>(y), run);
  }
}

// The gradient of a map, in its planes: for each tap, kernels^T times the gradient of the outputs.
template <class T>
void backward_x(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t taps = args.kernel_h * args.kernel_w, depth = args.inputs * taps;
  const int64_t in_blocks = blocks_of(args.inputs, args.in_block);
  const int64_t group_blocks = blocks_of(args.groups, args.group_block);
  const Planes all(args, args.out_height);
  const int64_t channels = args.group_block * args.in_block, across = round_up(args.outputs, kLanes<C>);
  const Planes widest(args, least(args.rows, args.out_height));
  Buffer<C> planes(all.size<C>(channels)), row(channels * round_up(args.width, kLanes<C>));
  Buffer<C> kernel(args.outputs * depth), turned(args.in_block * taps * across);
  Buffer<C> g(args.outputs * widest.run<C>());
  Buffer<C> scratch(args.outputs * round_up(widest.rows * args.out_width, kLanes<C>));
  int64_t mixed = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t i0 = task % in_blocks * args.in_block, outer = task / in_blocks;
    const int64_t g0 = outer % group_blocks * args.group_block, b = outer / group_blocks;
    const int64_t groups = least(args.group_block, args.groups - g0),
                  inputs = least(args.in_block, args.inputs - i0);
    memset(planes, 0, all.size<C>(groups * inputs) * sizeof(C));
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = (g0 + group) * args.outputs;
      // The blocks of a single group's inputs share its kernels.
      if (groups > 1 || outer != mixed)
        mix<1, T>(args, b, 1, first, args.outputs, depth, static_cast<C*>(kernel));
      mixed = outer;
      // The outputs' kernels side by side: (inputs, taps, outputs) of (outputs, depth).
      copy_tile<C>(FeatureMap<const C>{kernel + i0 * taps, 0, 1, depth}, 0, 0, inputs * taps, 0, args.outputs,
                   static_cast<C*>(turned), across);
      for (int64_t r = 0; r < args.out_height; r += args.rows) {
        const Planes shape(args, least(args.rows, args.out_height - r));
        load_outputs<T>(args, shape, b, first, args.outputs, r, static_cast<C*>(g), static_cast<C*>(scratch));
        for (int64_t tap = 0; tap < taps; ++tap) {
          C* out = planes + group * inputs * all.channel + all.tap(tap / args.kernel_w, tap % args.kernel_w) +
                   r * all.columns;
          multiply<256, C, C>(out, all.channel, inputs, Matrix<C>{turned + tap * across, taps * across, 1},
                              args.outputs, RowsBy<C>{g, shape.run<C>()}, shape.run<C>(), AddTo<C>{});
        }
      }
    }
    all.spill<T>(b, g0 * args.inputs + i0, groups * inputs, static_cast<const C*>(planes),
                 static_cast<C*>(row));
  }
}

template <class T>
void backward_weight(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t taps = args.kernel_h * args.kernel_w, depth = args.inputs * taps;
  const int64_t out_blocks = blocks_of(args.outputs, args.out_block);
  const Planes widest(args, least(args.rows, args.out_height));
  Buffer<C> planes(widest.size<C>(args.group_block * args.inputs));
  Buffer<C> row(args.group_block * args.inputs * round_up(args.width, kLanes<C>));
  Buffer<C> g(args.out_block * widest.run<C>());
  Buffer<C> scratch(args.out_block * round_up(widest.rows * args.out_width, kLanes<C>));
  const int64_t most = args.group_block * args.out_block;
  KernelSums<T> sums(args, most, depth);
  Buffer<double> grad(most * depth);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t o = task % out_blocks * args.out_block, g0 = task / out_blocks * args.group_block;
    const int64_t groups = least(args.group_block, args.groups - g0),
                  outputs = least(args.out_block, args.outputs - o);
    // Several groups have all of their outputs here, so these lie together in any case.
    const int64_t first = g0 * args.outputs + o;
    sums.start(first, groups * outputs);
    for (int64_t b = 0; b < args.batch; ++b) {
      memset(grad, 0, sums.size * sizeof(double));
      memset(sums.grad_bias, 0, sums.rows * sizeof(double));
      for (int64_t r = 0; r < args.out_height; r += args.rows) {
        const Planes shape(args, least(args.rows, args.out_height - r));
        const int64_t run = shape.run<C>();
        shape.fill<T>(b, g0 * args.inputs, groups * args.inputs, r, static_cast<C*>(planes),
                      static_cast<C*>(row));
        for (int64_t i = 0; i < groups; ++i) {
          load_outputs<T>(args, shape, b, first + i * outputs, outputs, r, static_cast<C*>(g),
                          static_cast<C*>(scratch));
          for (int64_t tap = 0; tap < taps; ++tap) {
            multiply_reduce<C>(grad + i * outputs * depth + tap, depth, taps, outputs, g, run, args.inputs,
                               planes + i * args.inputs * shape.channel +
                                   shape.tap(tap / args.kernel_w, tap % args.kernel_w),
                               shape.channel, run);
          }
          for (int64_t j = 0; sums.biased && j < outputs; ++j) {
            WideSum<C> sum;
            for (int64_t p = 0; p < run; p += kLanes<C>) sum.add(load(g + j * run + p));
            sums.grad_bias[i * outputs + j] += sum_lanes<C>(sum);
          }
        }
      }
      for (int64_t i = 0; i < sums.size; ++i) sums.grad[i] = static_cast<C>(grad[i]);
      sums.end_sample(b, task);
    }
    sums.write();
  }
}

// out[i * taps + tap] = from[tap * stride + i] for i < inputs; whole vectors are read.
template <class C>
void side_by_side(const C* from, int64_t stride, int64_t taps, int64_t inputs, C* out) {
  constexpr int64_t n = kLanes<C>;
  for (int64_t i = 0; i < inputs; i += n) {
    for (int64_t t = 0; t < taps; t += n) {
      vec<C> rows[n];
      for (int64_t r = 0; r < n; ++r) rows[r] = t + r < taps ? load(from + (t + r) * stride + i) : vec<C>{};
      transpose<C>(rows);
      for (int64_t r = 0; r < n && i + r < inputs; ++r)
        store_upto(out + (i + r) * taps + t, rows[r], taps - t);
    }
  }
}

// The same of one group with its inputs in the lanes, x being channels last: for each tap, the outputs'
// gradient times the pixels that the tap reads.
template <class T>
void backward_weight_of_many(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t taps = args.kernel_h * args.kernel_w, depth = args.inputs * taps;
  const int64_t lanes = round_up(args.inputs, kLanes<C>), most_rows = least(args.rows, args.out_height);
  const int64_t out_blocks = blocks_of(args.outputs, args.out_block);
  const int64_t columns = (args.out_width - 1) * args.stride_w + (args.kernel_w - 1) * args.dilation_w + 1;
  auto rows_of = [&](int64_t rows) {
    return (rows - 1) * args.stride_h + (args.kernel_h - 1) * args.dilation_h + 1;
  };
  Buffer<C> pixels(rows_of(most_rows) * columns * lanes), grad(taps * args.out_block * lanes);
  Buffer<C> scratch(args.out_block * round_up(most_rows * args.out_width, kLanes<C>));
  Buffer<int64_t> places(most_rows * args.out_width);
  for (int64_t i = 0; i < most_rows * args.out_width; ++i) {
    places[i] = (i / args.out_width * args.stride_h * columns + i % args.out_width * args.stride_w) * lanes;
  }
  KernelSums<T> sums(args, args.out_block, depth);
  const FeatureMap<const T> x = args.x.as<const T>(), turned{x.data, x.stride_b, x.stride_p, x.stride_c};
  const int64_t width = least(args.width, columns - args.padding_w);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t o = task % out_blocks * args.out_block, group = task / out_blocks;
    const int64_t outputs = least(args.out_block, args.outputs - o), first = group * args.outputs + o;
    sums.start(first, outputs);
    for (int64_t b = 0; b < args.batch; ++b) {
      memset(sums.grad_bias, 0, outputs * sizeof(double));
      for (int64_t r = 0; r < args.out_height; r += args.rows) {
        const int64_t rows = least(args.rows, args.out_height - r), count = rows * args.out_width;
        memset(pixels, 0, rows_of(rows) * columns * lanes * sizeof(C));
        const int64_t top = r * args.stride_h - args.padding_h;
        for (int64_t y = top < 0 ? 0 : top; y < args.height && y - top < rows_of(rows) && width > 0; ++y) {
          copy_tile<T>(turned, b, y * args.width, width, group * args.inputs, args.inputs,
                       pixels + ((y - top) * columns + args.padding_w) * lanes, lanes);
        }
        const Tile<C> g = load_tile<T>(args.grad_y.as<const T>(), b, first, outputs, r * args.out_width,
                                       count, static_cast<C*>(scratch));
        for (int64_t tap = 0; tap < taps; ++tap) {
          C* out = grad + tap * outputs * lanes;
          const int64_t place =
              tap / args.kernel_w * args.dilation_h * columns + tap % args.kernel_w * args.dilation_w;
          const Matrix<C> left{g.data, g.stride, 1};
          const RowsAt<C> right{pixels + place * lanes, places};
          if (r == 0) {
            multiply<32, C, C>(out, lanes, outputs, left, count, right, lanes);
          } else {
            multiply<32, C, C>(out, lanes, outputs, left, count, right, lanes, AddTo<C>{});
          }
        }
        for (int64_t j = 0; sums.biased && j < outputs; ++j) {
          WideSum<C> sum;
          for (int64_t p = 0; p < count; p += kLanes<C>)
            sum.add(load_upto(g.data + j * g.stride + p, count - p));
          sums.grad_bias[j] += sum_lanes<C>(sum);
        }
      }
      for (int64_t j = 0; j < outputs; ++j) {
        side_by_side<C>(grad + j * lanes, outputs * lanes, taps, args.inputs, sums.grad + j * depth);
      }
      sums.end_sample(b, task);
    }
    sums.write();
  }
}

}  // namespace

void dynamic_conv2d_forward(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) { forward<decltype(element)>(args, begin, end); });
}

void dynamic_conv2d_backward_x(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) { backward_x<decltype(element)>(args, begin, end); });
}

void dynamic_conv2d_backward_weight(const DynamicConvArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    args.inputs_in_lanes ? backward_weight_of_many<T>(args, begin, end)
                         : backward_weight<T>(args, begin, end);
  });
}

}  // namespace MFK_ISA
}  // namespace mfk
