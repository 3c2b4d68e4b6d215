// Dense gradients in 2, 3 or 4 bits, with a step for each block of elements: see Note [Few bits on the wire].
#pragma once

#include <cstdint>

#include "compress/kernels/scaled_rows.h"

namespace dear::compress::cpu {

// With c = grad + error of `n` elements, error [n] or null: the rows become c, rounded; error what that lost.
// Returns how many elements were dropped: where c is beyond kLargestLevelled or not finite, the error stands,
// and without one c is 0. `squares` [n], or null: a scale for each element, of its running mean square.
int64_t levels_encode(const void* grad, GradType type, float* error, float* squares, int64_t n,
                      const Rows& rows, int bits, int32_t* payload);

// The same for the mean of every rank's row of one shard, of which `n` elements exist, into one row. Summed
// in float32 in order of the ranks.
int64_t levels_average(const int32_t* payloads, const Rows& ranks, float* error, float* squares, int64_t n,
                       int bits, int32_t* out);

// out [n] becomes what the rows say, held within the range of `type`; `squares` then take it in.
void levels_decode(const int32_t* payload, const Rows& rows, int64_t n, int bits, GradType type,
                   float* squares, void* out);

}  // namespace dear::compress::cpu
