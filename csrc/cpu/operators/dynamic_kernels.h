// Kernels mixed for a sample, and the sums that are the gradients of what they are mixed from.
#pragma once

#include "../simd/tile.h"
#include "dynamic_conv2d.h"

namespace mfk {
namespace MFK_ISA {

MFK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The kernels of some outputs, mixed for `samples` samples from b on: (samples, outputs, depth). No more than
// kMost, for all of which the basis is read once.
template <int kMost, class T, class C>
void mix(const DynamicConvArgs& args, int64_t b, int64_t samples, int64_t first, int64_t outputs,
         int64_t depth, C* out) {
  const int64_t size = outputs * depth, all = args.groups * args.outputs * depth;
  const T* weight = static_cast<const T*>(args.weight) + first * depth;
  const T* basis = static_cast<const T*>(args.basis) + first * depth;
  const T* attention = static_cast<const T*>(args.attention) + b * args.kernels;
  const C scale = static_cast<C>(args.scale);
  constexpr int64_t n = kLanes<C>;
  auto mix_vectors = [&](auto count, int64_t i) __attribute__((always_inline)) {
    constexpr int vectors = decltype(count)::value;
    vec<C> sums[kMost][vectors] = {}, kernel[vectors];
    auto read = [&](const T* from) __attribute__((always_inline)) {
      for (int v = 0; v < vectors; ++v) {
        kernel[v] = vectors > 1 ? load(from + v * n) : load_upto(from, size - i);
      }
    };
    for (int64_t k = 0; k < args.kernels; ++k) {
      read(basis + k * all + i);
      for (int64_t s = 0; s < kMost; ++s) {  // those that do not exist repeat the last one
        const vec<C> share = splat(to_compute(attention[least(s, samples - 1) * args.kernels + k]));
        for (int v = 0; v < vectors; ++v) sums[s][v] += share * kernel[v];
      }
    }
    read(weight + i);
    for (int64_t s = 0; s < samples; ++s) {
      for (int v = 0; v < vectors; ++v) {
        const vec<C> mixed = kernel[v] + scale * sums[s][v];
        C* to = out + s * size + i + v * n;
        vectors > 1 ? store(to, mixed) : store_upto(to, mixed, size - i);
      }
    }
  };
  constexpr int kVectors = 8 / kMost;  // sums that registers hold
  int64_t i = 0;
  for (; size - i >= kVectors * n; i += kVectors * n) mix_vectors(std::integral_constant<int, kVectors>(), i);
  for (; i < size; i += n) mix_vectors(std::integral_constant<int, 1>(), i);
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
  const bool biased;  // else grad_bias need not be written
  int64_t first = 0, rows = 0, size = 0;
  Buffer<C> grad;            // of a sample, (rows, depth): whoever uses this writes it
  Buffer<double> grad_bias;  // (rows)
  static constexpr bool kDirect = sizeof(T) == sizeof(C);  // sums where they will be
  Buffer<C> weight, basis;
  Buffer<double> bias, basis_bias;

  KernelSums(const DynamicConvArgs& a, int64_t most, int64_t inner)
      : args(a),
        depth(inner),
        every(a.groups * a.outputs),
        biased(a.grad_bias != nullptr || a.basis_bias != nullptr),
        grad(most * depth),
        grad_bias(most),
        weight(kDirect ? 0 : most * depth),
        basis(kDirect ? 0 : a.kernels * most * depth),
        bias(most),
        basis_bias(a.kernels * most) {}

  void start(int64_t first_output, int64_t outputs) {
    first = first_output;
    rows = outputs;
    size = rows * depth;
    memset(bias, 0, rows * sizeof(double));
    memset(basis_bias, 0, args.kernels * rows * sizeof(double));
  }
  // The sums for attention go to the partial sums of the task.
  void end_sample(int64_t b, int64_t task) {
    constexpr int64_t n = kLanes<C>;
    double* dots = args.partial_attention + (task * args.batch + b) * args.kernels;
    auto add = [&](C* sum, int64_t i, vec<C> value) {
      store_upto(sum + i, b == 0 ? value : load_upto(sum + i, size - i) + value, size - i);
    };
    C* sum = weight_sum();
    for (int64_t i = 0; i < size; i += n) add(sum, i, load_upto(grad + i, size - i));
    for (int64_t k = 0; k < args.kernels; ++k) {
      const C by = to_compute(static_cast<const T*>(args.attention)[b * args.kernels + k]);
      const vec<C> scaled = splat(static_cast<C>(args.scale * by));
      const T* kernels = static_cast<const T*>(args.basis) + (k * every + first) * depth;
      sum = basis_sum(k);
      WideSum<C> dot;
      for (int64_t i = 0; i < size;) {
        vec<C> run{};
        const int64_t end = least(i + 8 * n, size);
        for (; i < end; i += n) {
          const vec<C> own = load_upto(grad + i, size - i);
          add(sum, i, scaled * own);
          run += own * load_upto(kernels + i, size - i);
        }
        dot.add(run);
      }
      long double bias_dot = 0;
      if (args.basis_bias != nullptr) {
        for (int64_t i = 0; i < rows; ++i) {
          basis_bias[k * rows + i] += by * grad_bias[i];
          bias_dot += static_cast<long double>(grad_bias[i]) *
                      to_compute(static_cast<const T*>(args.basis_bias)[k * every + first + i]);
        }
      }
      dots[k] = static_cast<double>(args.scale * sum_lanes<C>(dot) + bias_dot);
    }
    for (int64_t i = 0; biased && i < rows; ++i) bias[i] += grad_bias[i];
  }
  // After at least one sample.
  void write() {
    auto put = [&](void* to, int64_t at, const auto* from, int64_t count) {
      if (to == nullptr) return;
      for (int64_t i = 0; i < count; ++i) store_scalar(static_cast<T*>(to) + at + i, static_cast<C>(from[i]));
    };
    put(args.grad_bias, first, static_cast<const double*>(bias), rows);
    for (int64_t k = 0; k < args.kernels; ++k) {
      put(args.grad_basis_bias, k * every + first, static_cast<const double*>(basis_bias) + k * rows, rows);
    }
    if (kDirect) return;
    put(args.grad_weight, first * depth, weight_sum(), size);
    for (int64_t k = 0; k < args.kernels; ++k) {
      put(args.grad_basis, (k * every + first) * depth, basis_sum(k), size);
    }
  }

 private:
  C* weight_sum() { return kDirect ? static_cast<C*>(args.grad_weight) + first * depth : weight; }
  C* basis_sum(int64_t k) {
    return kDirect ? static_cast<C*>(args.grad_basis) + (k * every + first) * depth : basis + k * size;
  }
};

}  // namespace MFK_ISA
}  // namespace mfk
