// Kernels mixed for a sample, and the sums that are the gradients of what they are mixed from.
#pragma once

#include "dynamic_conv2d.h"
#include "tile.h"

namespace mfk {
namespace MFK_ISA {

MFK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The mixed kernels of some outputs, (outputs, depth).
template <class T, class C>
void mix(const DynamicConvArgs& args, int64_t b, int64_t first, int64_t outputs, int64_t depth, C* out) {
  const T* weight = static_cast<const T*>(args.weight) + first * depth;
  const T* basis = static_cast<const T*>(args.basis) + first * depth;
  const T* attention = static_cast<const T*>(args.attention) + b * args.kernels;
  const int64_t all = args.groups * args.outputs * depth;
  const C scale = static_cast<C>(args.scale);
  for (int64_t i = 0; i < outputs * depth; i += kLanes<C>) {
    const int64_t rest = outputs * depth - i;
    vec<C> sum{};
    for (int64_t k = 0; k < args.kernels; ++k) {
      sum += to_compute(attention[k]) * load_upto(basis + k * all + i, rest);
    }
    store_upto(out + i, load_upto(weight + i, rest) + scale * sum, rest);
  }
}
template <class T, class C>
C mixed_bias(const DynamicConvArgs& args, int64_t b, int64_t output) {
  C sum = args.bias == nullptr ? 0 : to_compute(static_cast<const T*>(args.bias)[output]);
  if (args.basis_bias == nullptr) return sum;
  const T* attention = static_cast<const T*>(args.attention) + b * args.kernels;
  for (int64_t k = 0; k < args.kernels; ++k) {
    sum += to_compute(attention[k]) *
           to_compute(static_cast<const T*>(args.basis_bias)[k * args.groups * args.outputs + output]);
  }
  return sum;
}

// With dW(b) the gradient of sample b's kernels: dweight = sum_b dW(b), dbasis_k = scale sum_b attention[b,k]
// dW(b), dattention[b,k] = scale <dW(b), basis_k>; the biases likewise, without the scale. For some outputs.
template <class T>
struct KernelSums {
  using C = compute_t<T>;
  const DynamicConvArgs& args;
  const int64_t depth, every;
  int64_t first = 0, rows = 0, size = 0;
  Buffer<C> rounded;
  Buffer<double> grad, grad_bias;  // of a sample, (rows, depth) and (rows): whoever uses this adds to them
  Buffer<double> weight, bias, basis, basis_bias;

  KernelSums(const DynamicConvArgs& a, int64_t most, int64_t inner)
      : args(a),
        depth(inner),
        every(a.groups * a.outputs),
        rounded(most * depth),
        grad(most * depth),
        grad_bias(most),
        weight(most * depth),
        bias(most),
        basis(a.kernels * most * depth),
        basis_bias(a.kernels * most) {}

  void start(int64_t first_output, int64_t outputs) {
    first = first_output;
    rows = outputs;
    size = rows * depth;
    memset(weight, 0, size * sizeof(double));
    memset(bias, 0, rows * sizeof(double));
    memset(basis, 0, args.kernels * size * sizeof(double));
    memset(basis_bias, 0, args.kernels * rows * sizeof(double));
  }
  void start_sample() {
    memset(grad, 0, size * sizeof(double));
    memset(grad_bias, 0, rows * sizeof(double));
  }
  // The sums for attention go to the partial sums of the task.
  void end_sample(int64_t b, int64_t task) {
    for (int64_t i = 0; i < size; ++i) {
      weight[i] += grad[i];
      rounded[i] = static_cast<C>(grad[i]);
    }
    for (int64_t i = 0; i < rows; ++i) bias[i] += grad_bias[i];
    for (int64_t k = 0; k < args.kernels; ++k) {
      const double by = to_compute(static_cast<const T*>(args.attention)[b * args.kernels + k]);
      const double scaled = args.scale * by;
      const T* kernels = static_cast<const T*>(args.basis) + (k * every + first) * depth;
      for (int64_t i = 0; i < size; ++i) basis[k * size + i] += scaled * grad[i];
      WideSum<C> dot;
      for (int64_t i = 0; i < size; i += kLanes<C>) {
        dot.add(load_upto(static_cast<const C*>(rounded) + i, size - i) * load_upto(kernels + i, size - i));
      }
      long double bias_dot = 0;
      if (args.basis_bias != nullptr) {
        for (int64_t i = 0; i < rows; ++i) {
          basis_bias[k * rows + i] += by * grad_bias[i];
          bias_dot += static_cast<long double>(grad_bias[i]) *
                      to_compute(static_cast<const T*>(args.basis_bias)[k * every + first + i]);
        }
      }
      args.partial_attention[(task * args.batch + b) * args.kernels + k] =
          static_cast<double>(args.scale * sum_lanes<C>(dot) + bias_dot);
    }
  }
  void write() {
    auto put = [&](void* to, int64_t at, const double* from, int64_t count) {
      if (to == nullptr) return;
      for (int64_t i = 0; i < count; ++i) store_scalar(static_cast<T*>(to) + at + i, static_cast<C>(from[i]));
    };
    put(args.grad_weight, first * depth, weight, size);
    put(args.grad_bias, first, bias, rows);
    for (int64_t k = 0; k < args.kernels; ++k) {
      put(args.grad_basis, (k * every + first) * depth, basis + k * size, size);
      put(args.grad_basis_bias, k * every + first, basis_bias + k * rows, rows);
    }
  }
};

}  // namespace MFK_ISA
}  // namespace mfk
