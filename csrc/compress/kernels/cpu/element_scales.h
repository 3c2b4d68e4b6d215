// A scale for each element, over one run that begins with a block: see Note [A scale for each element].
#pragma once

#include <cstdint>

namespace dear::compress::cpu {

// scales [n], of the running means of squares [n].
void element_scales(const float* squares, int64_t n, float* scales);

// out = values / scales, and values = values * scales; both exact, since scales are powers of two. `out` may
// be `values`.
void divide_by_scales(const float* values, const float* scales, int64_t n, float* out);
void multiply_by_scales(const float* scales, int64_t n, float* values);

// The running means take in the results [n].
void learn_squares(const float* results, int64_t n, float* squares);

}  // namespace dear::compress::cpu
