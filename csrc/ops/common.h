// What the operators' files share: PyTorch's stable ABI, checks that keep the kernels in bounds (the
// Python functions say the same in more words), and how tensors become FeatureMaps.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/feature_map.h"
#include "../huge_pages.h"
#include "../task_memory.h"

namespace mfk {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::BFloat16:
      return Dtype::kBf16;
    default:
      STD_TORCH_CHECK(false, op, ": x must be float32, float64 or bfloat16");
  }
  return Dtype::kFloat;
}

// The type of sums.
inline ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + ")";
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  auto sizes = t.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

// `t` is so small that products of its sizes do not overflow: sizes may be large where another one is zero,
// or where elements share their memory.
constexpr int64_t kMostElements = int64_t{1} << 40;
inline void check_size(const char* op, const char* name, const Tensor& t) {
  double elements = 1;
  for (const int64_t size : t.sizes()) elements *= std::max<int64_t>(size, 1);
  STD_TORCH_CHECK(elements <= kMostElements, op, ": ", name, " must have at most 2^40 elements, got shape ",
                  shape_text(shape_of(t)));
}

// `t` has so many axes, such as "(B, C, H, W)", and is not too large.
inline void check_axes(const char* op, const char* name, const Tensor& t, int64_t count, const char* axes) {
  STD_TORCH_CHECK(t.dim() == count, op, ": ", name, " must have ", count, " dimensions ", axes, ", got ",
                  t.dim());
  check_size(op, name, t);
}

// `t` has this shape, and x's dtype and device, and is not too large.
inline void check_argument(const char* op, const char* name, const Tensor& t, const Tensor& x,
                           const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(shape_of(t) == shape, op, ": ", name, " must have shape ", shape_text(shape), ", got ",
                  shape_text(shape_of(t)));
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), op, ": ", name, " must have the dtype of x");
  STD_TORCH_CHECK(t.is_cpu() == x.is_cpu() && t.get_device_index() == x.get_device_index(), op, ": ", name,
                  " must be on the device of x");
  check_size(op, name, t);
}

// `mask` is (B, H, W) of bool for the map x, on its device.
inline void check_mask(const char* op, const Tensor& mask, const Tensor& x) {
  const std::vector<int64_t> shape = {x.size(0), x.size(2), x.size(3)};
  STD_TORCH_CHECK(shape_of(mask) == shape, op, ": mask must have shape ", shape_text(shape), ", got ",
                  shape_text(shape_of(mask)));
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, op, ": mask must be a bool tensor");
  STD_TORCH_CHECK(mask.is_cpu() == x.is_cpu() && mask.get_device_index() == x.get_device_index(), op,
                  ": mask must be on the device of x");
}

// Channels in so many heads.
inline void check_heads(const char* op, int64_t num_heads, int64_t channels, const char* of) {
  const bool divide =
      num_heads >= 1 && num_heads <= std::max<int64_t>(channels, 1) && channels % num_heads == 0;
  STD_TORCH_CHECK(divide, op, ": num_heads must be positive and divide ", of, ", got ", num_heads, " for ",
                  channels);
}

inline bool is_channels_last(const Tensor& x) {
  return !x.is_contiguous() && x.size(1) > 1 && x.stride(1) == 1;
}

// The tensor itself where its numbers follow one another: asking PyTorch for it takes longer.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// An unwritten tensor on x's device. Straight from the allocator: through the dispatcher, which finds an
// operator by its name each time, it would take longer than a small kernel.
inline Tensor empty_strided(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                            ScalarType type, const Tensor& x) {
  int32_t dtype, device, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  if (type == ScalarType::Float) dtype = aoti_torch_dtype_float32();
  if (type == ScalarType::Double) dtype = aoti_torch_dtype_float64();
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &index));
  AtenTensorHandle handle;
  const auto code =
      aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(), dtype, device, index, &handle);
  STD_TORCH_CHECK(code == TORCH_SUCCESS, "mfkernels: no memory for a tensor of shape ", shape_text(shape));
  const Tensor t(handle);
  // Memory of some megabytes is often new, and a kernel would wait for each of its small pages.
  const size_t bytes = static_cast<size_t>(t.numel()) * t.element_size();
  if (bytes >= size_t{1} << 20) advise_huge_pages(reinterpret_cast<uintptr_t>(t.data_ptr()), bytes);
  if (bytes > 0 && memory_is_poisoned()) std::memset(t.data_ptr(), 0xff, bytes);
  return t;
}

// Of float32, float64 or x's dtype.
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType type, const Tensor& x) {
  std::vector<int64_t> strides(shape.size(), 1);
  bool overflow = false;
  for (size_t i = shape.size(); i-- > 1;) {
    overflow |= __builtin_mul_overflow(strides[i], std::max<int64_t>(shape[i], 1), &strides[i - 1]);
  }
  STD_TORCH_CHECK(!overflow, "mfkernels: no memory for a tensor of shape ", shape_text(shape));
  return empty_strided(shape, strides, type, x);
}

// An unwritten map in x's memory format; `empty_map` in mfkernels/operators/layout.py is its twin.
inline Tensor empty_map(const Tensor& x, const std::vector<int64_t>& shape) {
  if (!is_channels_last(x)) return empty(shape, x.scalar_type(), x);
  const int64_t channels = shape[1], row = shape[3] * channels;
  return empty_strided(shape, {shape[2] * row, 1, row, channels}, x.scalar_type(), x);
}
inline Tensor empty_map(const Tensor& x) { return empty_map(x, shape_of(x)); }

// The tensor itself where it has this dtype.
inline Tensor as_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// Where there is no memory for so many numbers as an argument's shape asks for, the error says so; `new`
// would end a process that runs under a sanitizer.
template <class T>
struct WorkingMemory {
  using value_type = T;
  WorkingMemory() = default;
  template <class U>
  WorkingMemory(const WorkingMemory<U>&) {}
  T* allocate(size_t count) {
    auto* memory = static_cast<T*>(std::malloc(count * sizeof(T)));
    STD_TORCH_CHECK(memory != nullptr, "mfkernels: no memory for ", count, " numbers");
    return memory;
  }
  void deallocate(T* memory, size_t) { std::free(memory); }
  friend bool operator==(const WorkingMemory&, const WorkingMemory&) { return true; }
  friend bool operator!=(const WorkingMemory&, const WorkingMemory&) { return false; }
};
using Doubles = std::vector<double, WorkingMemory<double>>;

// A vector's numbers; and a vector of such numbers in this dtype.
inline Doubles doubles(const Tensor& t) {
  Doubles values(t.numel());
  if (t.scalar_type() == ScalarType::Float) {  // by far the most, and without a copy
    const float* from = t.const_data_ptr<float>();
    for (size_t i = 0; i < values.size(); ++i) values[i] = from[i * t.stride(0)];
    return values;
  }
  const Tensor wide = dense(as_type(t, ScalarType::Double));
  std::copy_n(wide.const_data_ptr<double>(), values.size(), values.begin());
  return values;
}
inline Tensor from_doubles(const Doubles& values, ScalarType type, const Tensor& x) {
  const std::vector<int64_t> shape = {static_cast<int64_t>(values.size())};
  if (type == ScalarType::Float) {
    Tensor out = empty(shape, type, x);
    std::copy(values.begin(), values.end(), out.mutable_data_ptr<float>());
    return out;
  }
  Tensor out = empty(shape, ScalarType::Double, x);
  std::copy(values.begin(), values.end(), out.mutable_data_ptr<double>());
  return as_type(out, type);
}

// For the gradient of an argument: empty, without elements where it was left out.
inline Tensor empty_gradient(const std::optional<Tensor>& argument, const Tensor& x) {
  return empty(argument.has_value() ? shape_of(*argument) : std::vector<int64_t>{0}, x.scalar_type(), x);
}

// The map of a tensor in the memory format asked for. `holder` keeps a copy alive where the strides are
// not those of a map, or not those of that format.
inline AnyMap map_of(const Tensor& t, bool channels_last, Tensor& holder) {
  const int64_t height = t.size(2), width = t.size(3);
  auto pixel_stride = [&](const Tensor& u) { return width > 1 ? u.stride(3) : u.stride(2); };
  const bool one_run = height <= 1 || width <= 1 || t.stride(2) == width * t.stride(3);
  const bool in_format =
      channels_last ? t.size(1) <= 1 || t.stride(1) == 1 : height * width <= 1 || pixel_stride(t) == 1;
  holder = t;
  if (!one_run || !in_format) {
    holder =
        torch::stable::contiguous(t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }
  AnyMap map;
  map.data = holder.data_ptr();
  map.stride_b = holder.stride(0);
  map.stride_c = channels_last ? 1 : holder.stride(1);
  map.stride_p = channels_last ? pixel_stride(holder) : 1;
  return map;
}

// Work is split by the shape alone, never by the number of threads, so that results do not depend on it.
struct Splits {
  int64_t count, size;
};
inline Splits split_pixels(int64_t pixels, int64_t size) {
  return {std::max<int64_t>(1, (pixels + size - 1) / size), size};
}

// The largest tile whose `rows` rows in the compute type fill some three quarters of a first-level cache,
// a multiple of 32 pixels.
inline int64_t tile_pixels(int64_t rows, size_t element) {
  const int64_t fit = static_cast<int64_t>(24576 / element) / std::max<int64_t>(rows, 1) / 32 * 32;
  return std::min<int64_t>(std::max<int64_t>(fit, 32), 512);
}

// f(begin, end) over the tasks, on PyTorch's threads. What a task throws, working memory that is not there,
// is thrown here: through PyTorch's C functions would come no more than that something was.
template <class F>
void parallel_for(int64_t tasks, int64_t grain, const F& f) {
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error;
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    try {
      f(begin, end);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// So many tasks that starting a thread for them is worth it; `work` is one task's number of steps.
inline int64_t grain(int64_t work) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(work, 1)); }

// The sum over the splits of (B, heads, splits, M, D), as (B, M, heads D) in x's dtype and this shape.
// PyTorch's own operators would take longer for it than a small map's kernel.
struct Parts {
  int64_t batch, heads, splits, tokens, depth;
};
template <typename T>
void sum_splits(const double* partial, const Parts& parts, T* out) {
  const int64_t size = parts.tokens * parts.depth, width = parts.heads * parts.depth;
  parallel_for(parts.batch * parts.heads, grain(parts.splits * size), [&](int64_t begin, int64_t end) {
    std::vector<double> sums(size);
    for (int64_t i = begin; i < end; ++i) {
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t s = 0; s < parts.splits; ++s) {
        const double* from = partial + (i * parts.splits + s) * size;
        for (int64_t j = 0; j < size; ++j) sums[j] += from[j];
      }
      T* to = out + i / parts.heads * parts.tokens * width + i % parts.heads * parts.depth;
      for (int64_t t = 0; t < parts.tokens; ++t) {
        const double* row = sums.data() + t * parts.depth;
        for (int64_t d = 0; d < parts.depth; ++d) to[t * width + d] = static_cast<T>(row[d]);
      }
    }
  });
}
inline Tensor sum_splits(const Tensor& partial, const Parts& parts, const Tensor& x,
                         const std::vector<int64_t>& shape) {
  const bool is_float = x.scalar_type() == ScalarType::Float;
  Tensor out = empty(shape, is_float ? ScalarType::Float : ScalarType::Double, x);
  if (is_float) {
    sum_splits(partial.const_data_ptr<double>(), parts, out.mutable_data_ptr<float>());
    return out;
  }
  sum_splits(partial.const_data_ptr<double>(), parts, out.mutable_data_ptr<double>());
  return as_type(out, x.scalar_type());
}

}  // namespace mfk
