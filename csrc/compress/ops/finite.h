// Whether values are finite. For C++ callers.
#pragma once

#include "compress/ops/arguments.h"

namespace dear::compress::ops {

// count <- how many elements of `values` are not finite: flat and contiguous, of any type. `count`: int32
// [1], on the same device, for which it does not wait.
void count_nonfinite(const Tensor& values, const Tensor& count);

}  // namespace dear::compress::ops
