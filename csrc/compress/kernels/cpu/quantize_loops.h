// The loops of kernels/cpu/quantize.cpp, over one run of elements of one row. A run begins with a block that
// has a scale of its own.
#pragma once

#include <cstdint>

#include "compress/kernels/quantize.h"

namespace dear::compress::cpu {

// c = values + error, of n elements each, becomes codes and scales; error what that lost. Where c is beyond
// kLargestQuantized or not finite, the error stands in its place. Returns how many those are. `index`: of the
// first element, which with the key says what is drawn.
using QuantizeRun = int64_t (*)(const float* values, float* error, int64_t n, uint32_t key, uint32_t index,
                                uint8_t* codes, uint8_t* scales);

// total += factor, a power of two, times what the codes say; the first of them begins with a total of 0.
using AddCodes = void (*)(const uint8_t* codes, const uint8_t* scales, float factor, int64_t n, float* total);

QuantizeRun quantize_loop(CodeType code, bool stochastic);
AddCodes add_loop(CodeType code, bool first);

}  // namespace dear::compress::cpu
