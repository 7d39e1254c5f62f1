// The fastest that one thread can multiply and add, for the benchmark's "share of peak".
#pragma once

#include "../../isa.h"

namespace mfk {

struct PeakArgs {
  double* operations;  // of one task: float32, two a multiply-add
  float* result;       // written so that the work cannot be left out
};

MFK_DECLARE_KERNEL(multiply_add_peak, PeakArgs)

// Operations a second, the best of some runs of a few milliseconds.
__attribute__((visibility("default"))) double peak_flops();

}  // namespace mfk
