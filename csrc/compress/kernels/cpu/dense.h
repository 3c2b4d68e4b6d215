// Dense gradients in 16 bits: rounding, and the mean of what all ranks rounded. Arithmetic is in float32.
#pragma once

#include <cstdint>

#include "compress/kernels/scaled_rows.h"

namespace dear::compress::cpu {

// out = grad rounded to `out_type`, 16 bits. With `error` (else null) instead: c = grad + error, out = c
// rounded and held within the type's range, error = c - out. Returns how many elements count: without
// error those of `out` that are not finite, with it those of the gradient that were dropped.
int64_t dense_round(const void* grad, GradType type, float* error, int64_t n, GradType out_type, void* out);

// The same for the mean of `ranks` payloads of type `type`, `stride` elements apart, summed in their order.
// It is finite where the payloads are.
int64_t dense_average(const void* payloads, GradType type, int64_t ranks, int64_t stride, float* error,
                      int64_t n, void* out);

// out [n] becomes what the owners' rows of `type`, 16 bits, say; `rows` counts in elements.
void dense_decode(const void* payload, GradType type, const Rows& rows, int64_t n, float* out);

}  // namespace dear::compress::cpu
