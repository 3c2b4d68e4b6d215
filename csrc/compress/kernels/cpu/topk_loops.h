// The loops of the top-k kernels, over a run of elements. A magnitude is the 31 bits of an absolute value,
// whose order as integers is the order of the floats.
#pragma once

#include <cstdint>

#include "float_bits.h"

namespace dear::compress::cpu {

constexpr int64_t kGrainBlocks = 8;  // that a thread takes at a time, at least

inline uint32_t magnitude_bits(float value) { return float_bits(value) & ~kSignBit; }

// Of grad + error; of error alone where that is not finite.
void magnitudes_of_sum(const float* grad, const float* error, int64_t n, uint32_t* out);
void magnitudes(const float* values, int64_t n, uint32_t* out);

// One bit per element, in words of kWordBits: its magnitude reaches the threshold. Returns how many do.
int64_t mask_words(const float* values, int64_t words, uint32_t threshold, int32_t* masks);
int64_t mask_magnitudes(const uint32_t* values, int64_t words, uint32_t threshold, int32_t* masks);

int64_t count_at_least(const uint32_t* values, int64_t n, uint32_t limit);
int64_t count_equal(const float* values, int64_t n, uint32_t threshold);

}  // namespace dear::compress::cpu
