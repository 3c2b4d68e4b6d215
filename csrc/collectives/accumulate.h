#pragma once

#include <ATen/ATen.h>

namespace dear {

// out[i] = a[i] + b[i] for `count` elements, and the sum divided by `divisor` when that is not 1. The
// addition of 16-bit types is done in float32 and rounded once; integers are added modulo 2^bits and divided
// towards zero. `out` may be `a` or `b`. Pointers need no alignment beyond the type's own.
void accumulate(at::ScalarType type, void* out, const void* a, const void* b, int64_t count, int divisor);

// Throws one sentence when `type` cannot be summed (complex, quantised, bool).
void check_summable(at::ScalarType type);

}  // namespace dear
