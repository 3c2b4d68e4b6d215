#include "compress/kernels/cpu/topk_loops.h"

#include "compress/layout.h"
#include "isa.h"

namespace dear::compress::cpu {

namespace {

// Inlined into the clones, so that each has it in its own instructions.
template <typename Magnitude>
[[gnu::always_inline]] inline int64_t mask_run(const Magnitude& magnitude, int64_t words, uint32_t threshold,
                                               int32_t* masks) {
  int64_t count = 0;
  for (int64_t word = 0; word < words; ++word) {
    uint32_t mask = 0;
    for (int bit = 0; bit < kWordBits; ++bit) {
      mask |= static_cast<uint32_t>(magnitude(word * kWordBits + bit) >= threshold) << bit;
    }
    masks[word] = static_cast<int32_t>(mask);
    count += __builtin_popcount(mask);
  }
  return count;
}

}  // namespace

DEAR_CLONES void magnitudes_of_sum(const float* grad, const float* error, int64_t n, uint32_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float sum = grad[i] + error[i];
    out[i] = magnitude_bits(is_finite(sum) ? sum : error[i]);
  }
}

DEAR_CLONES void magnitudes(const float* values, int64_t n, uint32_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = magnitude_bits(values[i]);
}

DEAR_CLONES int64_t mask_words(const float* values, int64_t words, uint32_t threshold, int32_t* masks) {
  return mask_run([&](int64_t i) { return magnitude_bits(values[i]); }, words, threshold, masks);
}

DEAR_CLONES int64_t mask_magnitudes(const uint32_t* values, int64_t words, uint32_t threshold,
                                    int32_t* masks) {
  return mask_run([&](int64_t i) { return values[i]; }, words, threshold, masks);
}

DEAR_CLONES int64_t count_at_least(const uint32_t* values, int64_t n, uint32_t limit) {
  uint32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += values[i] >= limit;
  return count;
}

DEAR_CLONES int64_t count_equal(const float* values, int64_t n, uint32_t threshold) {
  uint32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += magnitude_bits(values[i]) == threshold;
  return count;
}

}  // namespace dear::compress::cpu
