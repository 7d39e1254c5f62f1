// mfkernels._C: what is not an operator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/simd/peak.h"
#include "huge_pages.h"
#include "isa.h"
#include "ops/plan_seal.h"
#include "task_memory.h"

namespace {

const std::map<std::string, mfk::Isa> kIsas = {
    {"generic", mfk::Isa::kGeneric},       {"avx2", mfk::Isa::kAvx2},
    {"avx2vnni", mfk::Isa::kAvx2Vnni},     {"avx512", mfk::Isa::kAvx512},
    {"avx512vnni", mfk::Isa::kAvx512Vnni}, {"amx", mfk::Isa::kAmx},
    {"dotprod", mfk::Isa::kDotprod},       {"i8mm", mfk::Isa::kI8mm}};

mfk::Isa parse(const std::string& name) {
  auto found = kIsas.find(name);
  if (found == kIsas.end()) throw std::invalid_argument("unknown instruction set '" + name + "'");
  return found->second;
}

std::string instruction_set() {
  for (const auto& [name, isa] : kIsas) {
    if (isa == mfk::isa()) return name;
  }
  throw std::logic_error("the instruction set in use has no name");
}

void set_instruction_set(const std::string& name) {
  if (!mfk::isa_supported(parse(name))) {
    throw std::runtime_error("instruction set '" + name + "' cannot run on this machine");
  }
  mfk::set_isa(parse(name));
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> features;
#if defined(__x86_64__)
#define MFK_FEATURE(name) \
  if (__builtin_cpu_supports(name)) features.push_back(name)
  MFK_FEATURE("sse4.2");
  MFK_FEATURE("avx");
  MFK_FEATURE("avx2");
  MFK_FEATURE("fma");
  MFK_FEATURE("avx512f");
  MFK_FEATURE("avx512bw");
  MFK_FEATURE("avx512dq");
  MFK_FEATURE("avx512vl");
  MFK_FEATURE("avx512vnni");
  MFK_FEATURE("avx512bf16");
#undef MFK_FEATURE
  if (mfk::isa_supported(mfk::Isa::kAvx2Vnni)) features.push_back("avx_vnni");
  if (mfk::isa_supported(mfk::Isa::kAmx)) features.push_back("amx_bf16");
#elif defined(__aarch64__)
  if (mfk::isa_supported(mfk::Isa::kDotprod)) features.push_back("asimddp");
  if (mfk::isa_supported(mfk::Isa::kI8mm)) features.push_back("i8mm");
  if (mfk::bf16_supported()) features.push_back("bf16");
#endif
  return features;
}

std::map<std::string, std::string> build_info() {
  return {{"compiler", MFK_COMPILER},
          {"build_type", MFK_BUILD_TYPE},
          {"built_with_torch", MFK_TORCH_VERSION},
          {"cuda", MFK_CUDA}};
}

}  // namespace

// The one state is the choice of instruction set and the poison of tests, both atomic: no lock is needed.
PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.doc() = "Build facts, CPU features and the choice of instruction set.";
  m.def("instruction_set", &instruction_set, "The instruction set whose kernels run.");
  m.def(
      "supports", [](const std::string& name) { return mfk::isa_supported(parse(name)); },
      "True if this build has the instruction set and this machine can run it.");
  m.def("set_instruction_set", &set_instruction_set, "Choose it, for the whole process.");
  m.def("bf16_supported", &mfk::bf16_supported, "True if deployed networks can run in bfloat16.");
  m.def("cpu_features", &cpu_features, "Features of this CPU that matter to the kernels.");
  m.def("advise_huge_pages", &mfk::advise_huge_pages, "Ask for large pages under memory not yet written.");
  m.def("sealed_plan", &mfk::sealed_plan, "A deployed network's plan, with what plans begin with.");
  m.def(
      "check_plan", [](const std::vector<int64_t>& words) { mfk::check_plan(words.data(), words.size()); },
      "RuntimeError where this is no plan, or not as it was made.");
  m.def("poison_memory", &mfk::poison_memory, "For tests: whether new memory is NaN until it is written.");
  m.def("peak_flops", &mfk::peak_flops, "Measures the float32 operations a second of one thread.");
  m.def("build_info", &build_info, "How this binary was built.");
}
