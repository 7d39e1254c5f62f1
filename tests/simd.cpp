// Checks the vectors of csrc/cpu/simd, compiled for one instruction set, against the C library in wider
// numbers. Says what is wrong, and fails then.
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>
#include <vector>

#include "../csrc/cpu/simd/gemm_operands.h"
#include "../csrc/cpu/simd/softmax.h"

// Errors that are promised with fused multiply-adds, and without.
#if defined(__FMA__) || defined(__aarch64__)
#define FUSED_OR_NOT(fused, parted) (fused)
#else
#define FUSED_OR_NOT(fused, parted) (parted)
#endif

namespace mfk {
namespace MFK_ISA {
namespace {

int failures = 0;

void expect(bool right, const char* what, double at, double got, double wanted) {
  constexpr int kTold = 20;
  if (right) return;
  if (++failures <= kTold) printf("%s: at %.9g it is %.17g, not %.17g\n", what, at, got, wanted);
}

// The same number with the same sign, or both NaN.
bool same(double a, double b) { return (a != a && b != b) || (a == b && signbit(a) == signbit(b)); }

void expect_same(const char* what, double at, double got, double wanted) {
  expect(same(got, wanted), what, at, got, wanted);
}

template <class C>
struct Limits;
template <>
struct Limits<float> {
  using bits = uint32_t;
  using wide = double;
  static constexpr int digits = FLT_MANT_DIG, power = FLT_MIN_EXP;
  static constexpr float largest = FLT_MAX, smallest = FLT_MIN, denormal = FLT_TRUE_MIN, step = FLT_EPSILON;
};
template <>
struct Limits<double> {
  using bits = uint64_t;
  using wide = long double;
  static constexpr int digits = DBL_MANT_DIG, power = DBL_MIN_EXP;
  static constexpr double largest = DBL_MAX, smallest = DBL_MIN, denormal = DBL_TRUE_MIN, step = DBL_EPSILON;
};
template <class C>
using wide_t = typename Limits<C>::wide;

template <class C>
std::vector<C> edges() {
  using L = Limits<C>;
  std::vector<C> all{0,
                     L::denormal,
                     L::smallest - L::denormal,
                     L::smallest,
                     C(0.1),
                     C(0.5),
                     1,
                     C(1) + L::step,
                     C(1) - L::step / 2,
                     C(1.5),
                     2,
                     3,
                     88,
                     700,
                     L::largest / 2,
                     L::largest,
                     C(INFINITY),
                     C(NAN)};
  for (size_t count = all.size(), i = 0; i < count; ++i) all.push_back(-all[i]);
  return all;
}

uint32_t random_state = 1;
// From -1 to 1.
double random_number() {
  random_state = random_state * 1664525u + 1013904223u;
  return static_cast<double>(random_state >> 8) / (1 << 23) - 1;
}
template <class C>
std::vector<C> random_numbers(int64_t count) {
  std::vector<C> all(count);
  for (C& value : all) value = static_cast<C>(random_number());
  return all;
}

// ---- Functions of one number

// So many units in the last place, so much, and so much of the argument's size.
struct Bound {
  double ulps, absolute, of_x;
};

template <class C>
double unit(wide_t<C> value) {
  int power;
  frexp(static_cast<double>(value), &power);
  return ldexp(1.0, (value == 0 || power < Limits<C>::power ? Limits<C>::power : power) - Limits<C>::digits);
}

// At so many numbers between two of the same sign, as many in each power of two, and at both.
template <class C>
void sweep(const char* what, C from, C to, vec<C> (*f)(vec<C>), wide_t<C> (*reference)(wide_t<C>),
           Bound bound) {
  constexpr int n = kLanes<C>, kVectors = (1 << 18) / n;
  typename Limits<C>::bits first, last;
  memcpy(&first, &from, sizeof first);
  memcpy(&last, &to, sizeof last);
  if (first > last) std::swap(first, last);
  const auto step = (last - first) / (kVectors * n) + 1;
  for (auto bits = first; bits < last;) {
    C x[n], y[n];
    for (C& value : x) {
      memcpy(&value, &bits, sizeof bits);
      bits = last - bits > step ? bits + step : last;
    }
    store(y, f(load(x)));
    for (int i = 0; i < n; ++i) {
      const wide_t<C> wanted = reference(x[i]);
      const double allowed =
          bound.ulps * unit<C>(wanted) + bound.absolute + bound.of_x * fabs(static_cast<double>(x[i]));
      const bool overflow = fabsl(wanted) + allowed > Limits<C>::largest && y[i] == C(INFINITY);
      expect(fabsl(y[i] - wanted) <= allowed || overflow, what, x[i], y[i], static_cast<double>(wanted));
    }
  }
}

template <class C>
struct Pair {
  C x, wanted;
};
// Exactly, in all lanes.
template <class C>
void at_points(const char* what, vec<C> (*f)(vec<C>), std::vector<Pair<C>> pairs) {
  pairs.push_back({C(NAN), C(NAN)});
  pairs.push_back({-C(NAN), C(NAN)});
  for (const auto& pair : pairs) {
    C y[kLanes<C>];
    store(y, f(splat(pair.x)));
    for (C value : y) expect_same(what, pair.x, value, pair.wanted);
  }
}

template <class X>
X tail_of(X size) {
  return erfc(size / sqrt(X(2))) / 2;
}
template <class X>
X gelu_of(X x) {
  return x * tail_of(-x);
}
template <class X>
X slope_of(X x) {
  return tail_of(-x) + x * ::expl(-x * x / 2) * 0.398942280401432677939946059934L;
}

void check_exp() {
  const auto f = [](vec<float> x) { return exp(x); };
  const auto reference = [](double x) { return ::exp(x); };
  const float low = -87.336544f;
  sweep<float>("exp", 0.0f, 89.0f, f, reference, {1.2, 0, 0});
  sweep<float>("exp", -0.0f, low, f, reference, {1.2, 0, 0});
  at_points<float>("exp", f,
                   {{0, 1},
                    {-0.0f, 1},
                    {FLT_TRUE_MIN, 1},
                    {-FLT_MIN, 1},
                    {nextafterf(low, -100), 0},
                    {-FLT_MAX, 0},
                    {-INFINITY, 0},
                    {88.73f, INFINITY},
                    {FLT_MAX, INFINITY},
                    {INFINITY, INFINITY}});
  expect(exp_scalar(low) >= FLT_MIN, "exp", low, exp_scalar(low), FLT_MIN);

  const auto g = [](vec<double> x) { return exp(x); };
  const auto wide = [](long double x) { return ::expl(x); };
  const double least = -708.3964185322641;
  sweep<double>("exp of doubles", 0.0, 709.79, g, wide, {1.2, 0, 0});
  sweep<double>("exp of doubles", -0.0, least, g, wide, {1.2, 0, 0});
  at_points<double>("exp of doubles", g,
                    {{0, 1},
                     {-0.0, 1},
                     {DBL_TRUE_MIN, 1},
                     {nextafter(least, -1000), 0},
                     {-DBL_MAX, 0},
                     {-INFINITY, 0},
                     {709.8, INFINITY},
                     {DBL_MAX, INFINITY},
                     {INFINITY, INFINITY}});
  expect_same("exp_scalar", 1, exp_scalar(1.0f), exp(splat(1.0f))[0]);

  const auto h = [](vec<float> x) { return exp_nonpositive(x); };
  sweep<float>("exp_nonpositive", -0.0f, low, h, reference, {1.2, 0, 0});
  const float least_result = h(splat(low))[0];
  at_points<float>("exp_nonpositive", h,
                   {{0, 1},
                    {-0.0f, 1},
                    {-FLT_MIN, 1},
                    {nextafterf(low, -100), least_result},
                    {-FLT_MAX, least_result},
                    {-INFINITY, least_result}});
  expect(least_result >= FLT_MIN, "exp_nonpositive", low, least_result, FLT_MIN);
}

void check_powers() {
  for (int n = -126; n <= 129; ++n) {
    const float wanted = n < 128 ? ldexpf(1.0f, n) : INFINITY;
    const vec<float> shifted = splat(kExpShift) + static_cast<float>(n);
    if (n < 128) {
      expect_same("times_power", n, times_power(splat(1.0f), shifted)[kLanes<float> - 1], wanted);
      expect_same("times_power", n, times_power(splat(NAN), shifted)[0], NAN);
    }
    expect_same("times_any_power", n, times_any_power(splat(1.0f), shifted)[kLanes<float> - 1], wanted);
    expect_same("times_any_power", n, times_any_power(splat(NAN), shifted)[0], NAN);
  }
  expect_same("times_any_power", 128, times_any_power(splat(0.75f), splat(kExpShift + 128))[0],
              ldexpf(0.75f, 128));

  const auto f = [](vec<float> x) { return exp2_normal(x); };
  const auto reference = [](double x) { return ::exp2(x); };
  sweep<float>("exp2_normal", 0.0f, nextafterf(128, 0), f, reference, {1.8, 0, 0});
  sweep<float>("exp2_normal", -0.0f, nextafterf(-126, 0), f, reference, {1.8, 0, 0});
  at_points<float>("exp2_normal", f, {{0, 1}, {-0.0f, 1}});
}

void check_gelu() {
  using Of = double (*)(double);
  const Of tail = tail_of<double>, of = gelu_of<double>, slope = slope_of<double>;
  const float largest = FLT_MAX, smallest = FLT_TRUE_MIN;
  const auto f = [](vec<float> x) { return normal_tail(x); };
  sweep<float>("normal_tail", 1e-6f, 8.0f, f, tail, {0, FUSED_OR_NOT(5e-8, 6e-8), 0});
  sweep<float>("normal_tail", 0.0f, largest, f, tail, {0, FUSED_OR_NOT(5e-8, 6e-8), 0});
  at_points<float>("normal_tail", f, {{0, 0.5f}, {smallest, 0.5f}});
  const auto quick = [](vec<float> x) { return quick_normal_tail(x); };
  sweep<float>("quick_normal_tail", 1e-6f, 5.5f, quick, tail, {0, FUSED_OR_NOT(1.7e-7, 2e-7), 0});
  at_points<float>("quick_normal_tail", quick, {{0, 0.5f}, {smallest, 0.5f}});

  for (const float sign : {1.0f, -1.0f}) {
    const auto g = [](vec<float> x) { return gelu(x); };
    sweep<float>("gelu", sign * 1e-4f, sign * 8, g, of, {0, 0, FUSED_OR_NOT(1.9e-7, 2.3e-7)});
    sweep<float>("gelu", sign * 0, sign * largest, g, of, {0, smallest, FUSED_OR_NOT(1.9e-7, 2.3e-7)});
    const auto strict = [](vec<float> x) { return strict_gelu(x); };
    sweep<float>("strict_gelu", sign * 1e-4f, sign * 8, strict, of, {0, 0, FUSED_OR_NOT(1.1e-7, 1.3e-7)});
    sweep<float>("strict_gelu", sign * 0, sign * largest, strict, of,
                 {0, smallest, FUSED_OR_NOT(1.1e-7, 1.3e-7)});
    const auto down = [](vec<float> x) { return gelu_slope(x); };
    sweep<float>("gelu_slope", sign * 1e-4f, sign * 16, down, slope, {0, FUSED_OR_NOT(1.5e-7, 1.7e-7), 0});
    sweep<float>("gelu_slope", sign * 0, sign * largest, down, slope, {0, FUSED_OR_NOT(1.5e-7, 1.7e-7), 0});
    at_points<float>("gelu", g,
                     {{0, 0},
                      {-0.0f, -0.0f},
                      {100, 100},
                      {-100, 0},
                      {largest, largest},
                      {-largest, 0},
                      {INFINITY, INFINITY},
                      {-INFINITY, 0}});
    at_points<float>("strict_gelu", strict,
                     {{0, 0},
                      {-0.0f, -0.0f},
                      {100, 100},
                      {-100, -0.0f},
                      {largest, largest},
                      {-largest, -0.0f},
                      {INFINITY, INFINITY},
                      {-INFINITY, NAN}});
    at_points<float>("gelu_slope", down, {{0, 0.5f}, {-0.0f, 0.5f}, {INFINITY, NAN}, {-INFINITY, NAN}});
  }

  using Wide = long double (*)(long double);
  const Wide share = [](long double x) { return tail_of(-x); };
  for (const double sign : {1.0, -1.0}) {
    sweep<double>("below", sign * 1e-3, sign * 40, [](vec<double> x) { return below(x); }, share,
                  {4, 4e-16, 0});
    sweep<double>("strict_gelu of doubles", sign * 1e-3, sign * 40,
                  [](vec<double> x) { return strict_gelu(x); }, gelu_of<long double>, {0, 0, 4e-16});
    sweep<double>("gelu_slope of doubles", sign * 1e-3, sign * 40,
                  [](vec<double> x) { return gelu_slope(x); }, slope_of<long double>, {0, 1e-15, 0});
  }
  at_points<double>("below", [](vec<double> x) { return below(x); },
                    {{0, 0.5}, {-0.0, 0.5}, {INFINITY, 1}, {-INFINITY, 0}});
  at_points<double>("strict_gelu of doubles", [](vec<double> x) { return strict_gelu(x); },
                    {{0, 0}, {-0.0, -0.0}, {INFINITY, INFINITY}, {-INFINITY, NAN}});
  at_points<double>("gelu_slope of doubles", [](vec<double> x) { return gelu_slope(x); },
                    {{0, 0.5}, {-0.0, 0.5}, {INFINITY, NAN}, {-INFINITY, NAN}});
}

// ---- Comparisons

template <class C>
void check_comparisons() {
  for (const C a : edges<C>()) {
    for (const C b : edges<C>()) {
      const vec<C> x = splat(a), y = splat(b);
      for (int i = 0; i < kLanes<C>; ++i) {
        expect_same("maximum", a, maximum(x, y)[i], a != a ? a : (a > b ? a : b));
        if constexpr (std::is_same<C, float>::value) {
          expect_same("larger", a, larger(x, y)[i], a > b ? a : b);
          expect_same("smaller", a, smaller(x, y)[i], a < b ? a : b);
        }
        expect_same("<", a, (x < y)[i], a < b ? -1 : 0);
        expect_same("==", a, (x == y)[i], a == b ? -1 : 0);
        expect_same("!=", a, (x != y)[i], a != b ? -1 : 0);
      }
    }
    expect_same("splat", a, splat(a)[kLanes<C> - 1], a);
    expect_same("to_compute", a, to_compute(a), a);
    expect_same("in_register", a, in_register(splat(a))[kLanes<C> - 1], a);
    C stored = 7;
    store_scalar(&stored, a);
    expect_same("store_scalar", a, stored, a);
    if constexpr (std::is_same<C, float>::value) {
      expect_same("absolute", a, absolute(splat(a))[0], fabsf(a));
      typename VectorOf<float, kLanes<double>>::type narrow{};
      narrow[kLanes<double> - 1] = a;
      expect_same("widened", a, widened(narrow)[kLanes<double> - 1], a);
      if (kLanes<double> > 1) expect_same("widened", a, widened(narrow)[0], 0);
    }
  }
  for (int n = 0; n <= kLanes<C> + 1; ++n) {
    for (int i = 0; i < kLanes<C>; ++i) {
      expect_same("first_lanes", n, first_lanes<C>(n)[i], i < n ? -1 : 0);
    }
  }
  for (int top = 0; top < kLanes<C>; ++top) {
    for (const C largest : {C(INFINITY), C(3), C(-1)}) {
      vec<C> v = splat(C(-2));
      v[top] = largest;
      expect_same("max_lanes", top, max_lanes<C>(v), largest);
    }
  }
  expect_same("max_lanes", 0, max_lanes<C>(splat(-C(INFINITY))), -INFINITY);
}

// ---- Memory

// A page after which comes one that must not be touched.
class Fenced {
 public:
  Fenced()
      : page_(sysconf(_SC_PAGESIZE)),
        memory_(static_cast<char*>(
            mmap(nullptr, 2 * page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
    if (memory_ == MAP_FAILED || mprotect(memory_ + page_, page_, PROT_NONE) != 0) {
      throw std::runtime_error("no page is protected");
    }
  }
  ~Fenced() { munmap(memory_, 2 * page_); }
  template <class T>
  T* end() const {
    return reinterpret_cast<T*>(memory_ + page_);
  }

 private:
  size_t page_;
  char* memory_;
};

template <class T>
T number(int i) {
  return static_cast<T>(i + 1.5);
}
template <>
bf16 number<bf16>(int i) {
  return {static_cast<uint16_t>(0x3f80 + i)};
}
template <class T>
double value_of(T stored) {
  return static_cast<double>(to_compute(stored));
}

template <class T>
void check_memory(const char* what) {
  using C = compute_t<T>;
  constexpr int n = kLanes<C>;
  Fenced fenced;
  for (int count = 0; count <= 2 * n; ++count) {
    const int inside = count < n ? count : n;
    T* const p = fenced.end<T>() - count;
    for (int i = 0; i < count; ++i) p[i] = number<T>(i);
    const vec<C> read = load_upto(p, count);
    for (int i = 0; i < n; ++i) {
      const double wanted = i < inside ? value_of(number<T>(i)) : 0;
      expect_same(what, count, read[i], wanted);
      if (count < n) expect_same(what, count, load_part(p, count)[i], wanted);
      if (count >= n) expect_same(what, count, load(p)[i], wanted);
    }
    // Not aligned, with neighbours that stay.
    vec<C> v;
    for (int i = 0; i < n; ++i) v[i] = value_of(number<T>(n + i));
    auto check_store = [&](auto to) {
      T out[3 * n + 1];
      for (T& value : out) value = number<T>(0);
      to(out + 1);
      for (int i = 0; i < 3 * n + 1; ++i) {
        const bool written = i >= 1 && i < 1 + inside;
        expect_same(what, count, value_of(out[i]), value_of(number<T>(written ? n + i - 1 : 0)));
      }
    };
    check_store([&](T* to) { store_upto(to, v, count); });
    if (count < n) check_store([&](T* to) { store_part(to, v, count); });
    if (count == n) check_store([&](T* to) { store(to, v); });
    store_upto(p, v, count);  // must not touch the fence
    if (count > 0) expect_same(what, count, value_of(p[0]), value_of(number<T>(n)));
  }
}

// To nearest, ties to even; NaN stays NaN.
uint16_t rounded(uint32_t bits) {
  const uint32_t kept = bits >> 16, rest = bits & 0xffff;
  return static_cast<uint16_t>(kept + (rest > 0x8000 || (rest == 0x8000 && kept % 2 == 1)));
}

void check_bfloat16() {
  constexpr int n = kLanes<float>;
#if defined(__AVX512BF16__)
  constexpr bool kDenormals = false;
#else
  constexpr bool kDenormals = true;
#endif
  for (uint32_t high = 0; high < 1 << 16; ++high) {
    const bf16 stored{static_cast<uint16_t>(high)};
    const uint32_t word = high << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    expect_same("to_compute of bfloat16", high, to_compute(stored), value);
    bf16 vector[n];
    for (bf16& lane : vector) lane = stored;
    expect_same("load of bfloat16", high, load(vector)[high % n], value);
    for (const uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      const uint32_t bits = word | low;
      memcpy(&value, &bits, sizeof value);
      const bf16 nearest{rounded(bits)};
      const float wanted = value != value ? NAN : to_compute(nearest);
      bf16 scalar;
      store_scalar(&scalar, value);
      expect_same("store_scalar to bfloat16", value, to_compute(scalar), wanted);
      store(vector, splat(value));
      const float got = to_compute(vector[high % n]);
      const bool denormal = value != 0 && fabsf(value) < FLT_MIN;
      expect(same(got, wanted) || (denormal && !kDenormals && same(got, copysignf(0, value))),
             "store to bfloat16", value, got, wanted);
    }
  }
}

void check_bytes() {
  constexpr int n = kLanes<float>;
  for (int value = -128; value < 128; ++value) {
    int8_t in[n];
    for (int i = 0; i < n; ++i) in[i] = static_cast<int8_t>(i % 2 == 0 ? value : ~value);
    const vec<float> loaded = load(in);
    for (int i = 0; i < n; ++i) expect_same("load of bytes", value, loaded[i], in[i]);
  }
  for (int value = 0; value < 256; ++value) {
    for (const float base : {8388608.0f, 8388608.0f + 256 * 77, 12582912.0f, 16776960.0f}) {
      vec<float> v;
      for (int i = 0; i < n; ++i) v[i] = base + static_cast<float>((value + i) % 256);
      uint8_t out[n + 2];
      memset(out, 9, sizeof out);
      store(out + 1, v);
      for (int i = 0; i < n; ++i) expect_same("store of bytes", value, out[i + 1], (value + i) % 256);
      expect_same("store of bytes", value, out[0] + out[n + 1], 18);
    }
  }
#if MFK_INT8
  for (const int32_t value : {0, 1, -1, 255, -100000, 16777215, -16777216, INT32_MAX, INT32_MIN}) {
    mask<float> integers = mask<float>{} + value;
    const auto v = reinterpret_cast<vec<float>>(integers);
    for (int i = 0; i < n; ++i)
      expect_same("from_integers", value, from_integers(v)[i], static_cast<float>(value));
    const auto more = reinterpret_cast<vec<float>>(mask<float>{} + 3);
    if (value < INT32_MAX) {
      const auto sum = reinterpret_cast<mask<float>>(add_sums<uint8_t>(v, more));
      expect_same("add_sums", value, sum[n - 1], value + 3.0);
    }
  }
#endif
  expect_same("add_sums", 1, add_sums<float>(splat(1.5f), splat(2.0f))[0], 3.5);
}

void check_buffers() {
  for (int round = 0; round < 3; ++round) {
    Buffer<float> first(5);
    Buffer<double> second(1000);
    Buffer<float> none(0);
    for (const void* p :
         {static_cast<void*>(static_cast<float*>(first)), static_cast<void*>(static_cast<double*>(second))}) {
      expect_same("Buffer", round, reinterpret_cast<uintptr_t>(p) % 64, 0);
    }
    for (int i = 0; i < 5; ++i) first[i] = 1;
    for (int i = 0; i < 1000; ++i) second[i] = 2;
    for (int i = 0; i < 5; ++i) expect_same("Buffer", i, first[i], 1);
  }
  poison_memory(true);
  {
    Buffer<float> poisoned(3);
    for (int i = 0; i < 3; ++i) expect_same("a poisoned Buffer", i, poisoned[i], NAN);
  }
  poison_memory(false);
  for (const int64_t count : {int64_t{1} << 60, int64_t{-4}}) {
    bool thrown = false;
    try {
      Buffer<float> endless(count);
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    expect_same("Buffer without memory", static_cast<double>(count), thrown, true);
  }
}

// ---- Sums

template <class C>
void check_lanes() {
  constexpr int n = kLanes<C>;
  vec<C> v;
  double total = 0;
  for (int i = 0; i < n; ++i) total += v[i] = static_cast<C>(ldexp(i % 2 == 0 ? 1 : -1, i));
  expect_same("sum_lanes", n, sum_lanes<C>(v), total);
  expect_same("wide_lanes", n, sum_all(wide_lanes<C>(v)), total);
  const C largest = Limits<C>::largest;
  expect_same("sum_lanes", largest, sum_lanes<C>(splat(C(INFINITY))), INFINITY);
  expect_same("sum_lanes", largest, sum_lanes<C>(splat(C(NAN))), NAN);
  if (sizeof(C) < sizeof(double)) {
    expect_same("sum_lanes", largest, sum_lanes<C>(splat(largest)), n * static_cast<double>(largest));
  }

  WideSum<C> sum;
  sum.add(v);
  sum.add_product(v, v);
  double out[n + 2];
  for (int count = 0; count <= n; ++count) {
    for (double& value : out) value = 7;
    sum.store_upto(out + 1, count);
    for (int i = 0; i < n + 2; ++i) {
      const double of = i >= 1 && i <= n ? static_cast<double>(v[i - 1]) : 0;
      expect_same("WideSum::store_upto", count, out[i], i >= 1 && i <= count ? of + of * of : 7);
    }
  }
  WideSum<C> infinite;
  infinite.add(splat(C(INFINITY)));
  infinite.add(splat(C(1)));
  expect_same("WideSum of an infinity", n, sum_lanes(infinite), INFINITY);
  infinite.add(splat(C(NAN)));
  expect_same("WideSum of NaN", n, sum_lanes(infinite), NAN);

  constexpr int64_t kCount = 100000;
  const auto a = random_numbers<C>(kCount * n), b = random_numbers<C>(kCount * n);
  WideSum<C> plain, products;
  long double exact = 0, exact_products = 0;
  for (int64_t i = 0; i < kCount * n; i += n) {
    plain.add(load(&a[i]));
    products.add_product(load(&a[i]), load(&b[i]));
  }
  double size = 0, size_of_products = 0;
  for (int64_t i = 0; i < kCount * n; ++i) {
    const long double product = static_cast<long double>(a[i]) * b[i];
    exact += a[i];
    exact_products += product;
    size += fabs(static_cast<double>(a[i]));
    size_of_products += static_cast<double>(fabsl(product));
  }
  // A sum of floats rounds to a double at each summand. Of doubles the error does not grow with their number.
  const double relative = (sizeof(C) == sizeof(double) ? 4 : kCount) * 0x1p-53;
  const double got = sum_lanes(plain), got_products = sum_lanes(products);
  expect(fabsl(got - exact) <= relative * size, "WideSum", n, got, static_cast<double>(exact));
  expect(fabsl(got_products - exact_products) <= relative * size_of_products, "WideSum of products", n,
         got_products, static_cast<double>(exact_products));
}

void check_wide_sums() {
  WideSum<double> sum;
  sum.add(splat(1e16));
  for (int i = 0; i < 1001; ++i) sum.add(splat(1.0));
  sum.add(splat(-1e16));
  expect_same("WideSum of doubles", 1001, sum.folded()[0], 1001);

  WideSum<float> squares;
  vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = static_cast<float>(i + 1);
  squares.add_square(v, 3);
  double out[kLanes<float>];
  squares.store_upto(out, kLanes<float>);
  for (int i = 0; i < kLanes<float>; ++i) expect_same("add_square", i, out[i], 3.0 * (i + 1) * (i + 1));

  for (int64_t count : {0, 1, 3, 4, 63, 64, 65, 66, 67, 128, 5000}) {
    const auto a = random_numbers<float>(count);
    double exact = 0, size = 0;
    for (float value : a) {
      exact += value;
      size += fabs(value);
    }
    const double got = sum_terms<float>(count, [&](int64_t i) { return splat(a[i]); })[0];
    expect(fabs(got - exact) <= 1e-7 * size, "sum_terms", static_cast<double>(count), got, exact);
  }
  // One running sum would be off by 1e-4 of it.
  const double got = sum_terms<float>(10000, [](int64_t) { return splat(0.1f); })[0];
  expect(fabs(got / (10000 * static_cast<double>(0.1f)) - 1) <= 1e-5, "sum_terms", 10000, got, 1000);
}

// ---- Softmax

template <class C>
void check_softmax() {
  constexpr int n = kLanes<C>;
  constexpr int64_t width = 2 * n, stride = width + 3;
  const double step = Limits<C>::step;
  const C scale = C(0.25);  // products with it are exact
  for (const int64_t count : {1, 2, 3, 4, 63, 65, 300}) {
    auto logits = random_numbers<C>(count * stride);
    for (C& value : logits) value *= 60;
    for (int64_t i = 0; i < count; ++i) {
      if (i % 5 == 2) logits[i * stride + 1] = -C(INFINITY);
      for (int64_t j = width; j < stride; ++j) logits[i * stride + j] = 7;
    }
    if (count > 2) {
      logits[stride + 2] = C(NAN);
      logits[stride + 3] = C(INFINITY);
    }
    auto weights = logits;
    softmax_rows(weights.data(), scale, count, stride, width);
    for (int64_t j = 0; j < stride; ++j) {
      wide_t<C> top = -INFINITY, sum = 0;
      for (int64_t i = 0; i < count; ++i) {
        const C value = logits[i * stride + j] * scale;
        top = value > top || value != value ? value : top;
      }
      for (int64_t i = 0; i < count; ++i) sum += ::expl(logits[i * stride + j] * scale - top);
      for (int64_t i = 0; i < count; ++i) {
        const C got = weights[i * stride + j];
        if (j >= width) {
          expect_same("softmax_rows beside its columns", static_cast<double>(j), got, 7);
          continue;
        }
        const wide_t<C> distance = top - logits[i * stride + j] * scale, wanted = ::expl(-distance) / sum;
        // The distance is rounded, and so is the weight, in several steps.
        const auto allowed = wanted > 0 ? (4 + distance) * step * wanted + Limits<C>::smallest : 0;
        expect(wanted != wanted ? got != got : fabsl(got - wanted) <= allowed, "softmax_rows",
               static_cast<double>(j), got, static_cast<double>(wanted));
      }
    }
  }
}

template <class C>
void check_softmax_gradient() {
  constexpr int n = kLanes<C>;
  constexpr int64_t width = 2 * n, stride = width + 3;
  const double step = Limits<C>::step;
  const C scale = C(0.25);
  for (const int64_t count : {1, 2, 3, 4, 63, 65, 300}) {
    auto logits = random_numbers<C>(count * stride), grads = random_numbers<C>(count * stride);
    std::vector<C> weights(count * stride, 7);
    std::vector<double> exact(count * stride);
    for (int64_t j = 0; j < width; ++j) {
      // In every second column one weight is nearly one, and the gradients are large beside their distance.
      const bool steep = j % 2 == 1;
      double sum = 0;
      for (int64_t i = 0; i < count; ++i) {
        if (steep) {
          logits[i * stride + j] -= i == count / 2 ? 0 : 12;
          grads[i * stride + j] += 1000;
        }
        sum += ::exp(logits[i * stride + j]);
      }
      for (int64_t i = 0; i < count; ++i) {
        exact[i * stride + j] = ::exp(logits[i * stride + j]) / sum;
        weights[i * stride + j] = static_cast<C>(exact[i * stride + j]);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = width; j < stride; ++j) grads[i * stride + j] = 7;
    }
    auto got = grads;
    softmax_rows_backward(weights.data(), got.data(), scale, count, stride, width);
    for (int64_t j = 0; j < stride; ++j) {
      if (j >= width) {
        for (int64_t i = 0; i < count; ++i) {
          expect_same("softmax_rows_backward beside", static_cast<double>(j), got[i * stride + j], 7);
        }
        continue;
      }
      // Around the middle, so that the exact one has its digits, too.
      const double middle = grads[count / 2 * stride + j];
      long double mean = 0;
      for (int64_t i = 0; i < count; ++i) mean += exact[i * stride + j] * (grads[i * stride + j] - middle);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = i * stride + j;
        const double wanted =
            static_cast<double>(exact[at] * (grads[at] - middle - mean) * static_cast<double>(scale));
        // Distances are at most 2; a large gradient's are exact.
        const double allowed = 4 * step * exact[at] * (2 + fabs(static_cast<double>(mean)));
        expect(fabs(got[at] - wanted) <= allowed, "softmax_rows_backward", static_cast<double>(j), got[at],
               wanted);
      }
    }
  }
}

void check_constants() {
  for (int n = -1; n <= 6; ++n) {
    int called = 0, with = 0;
    with_constant<5>(n, [&](auto constant) {
      ++called;
      with = decltype(constant)::value;
    });
    const bool known = n >= 1 && n <= 5;
    expect_same("with_constant", n, called, known ? 1 : 0);
    expect_same("with_constant", n, with, known ? n : 0);
  }
  int order = 0;
  unrolled<4>([&](auto i) { order = order * 10 + i + 1; });
  expect_same("unrolled", 4, order, 1234);
  for (int n = 0; n < 40; ++n) {
    const double up = static_cast<double>(round_up(n, 16));
    expect_same("round_up", n, up, (n + 15) / 16 * 16);
  }
}

int run() {
  check_exp();
  check_powers();
  check_gelu();
  check_comparisons<float>();
  check_comparisons<double>();
  check_memory<float>("floats in memory");
  check_memory<double>("doubles in memory");
  check_memory<bf16>("bfloat16 in memory");
  check_bfloat16();
  check_bytes();
  check_buffers();
  check_lanes<float>();
  check_lanes<double>();
  check_wide_sums();
  check_softmax<float>();
  check_softmax<double>();
  check_softmax_gradient<float>();
  check_softmax_gradient<double>();
  check_constants();
  if (failures > 0) printf("%d checks failed\n", failures);
  return failures > 0;
}

}  // namespace
}  // namespace MFK_ISA
}  // namespace mfk

int main() { return mfk::MFK_ISA::run(); }
