#include "compress/kernels/cpu/levels_loops.h"

#include <algorithm>

#include "compress/kernels/cpu/scale_blocks.h"
#include "float_bits.h"
#include "isa.h"

namespace dear::compress::cpu {

namespace {

// One field of a block's codes, from 32-bit lanes: neighbours go to neighbouring words.
template <int kBits, int kNumber>
DEAR_INLINED void pack_field(const uint32_t* __restrict codes, uint32_t* __restrict fields) {
  constexpr Field field = field_of(kBits, kNumber);
  constexpr int count = field.word_count();
  uint32_t words[count] = {};
  for (int place = 0; place < field.places(); ++place) {
    for (int word = 0; word < count; ++word) {
      const uint32_t part = codes[place * count + word] >> field.shift & field.mask();
      words[word] |= part << (place * field.width);
    }
  }
  for (int word = 0; word < count; ++word) fields[field.words + word] = words[word];
}

template <int kBits, int kNumber>
DEAR_INLINED void unpack_field(const uint32_t* __restrict fields, uint32_t* __restrict codes) {
  constexpr Field field = field_of(kBits, kNumber);
  constexpr int count = field.word_count();
  for (int place = 0; place < field.places(); ++place) {
    for (int word = 0; word < count; ++word) {
      const uint32_t part = fields[field.words + word] >> (place * field.width) & field.mask();
      uint32_t& code = codes[place * count + word];
      code = (kNumber == 0 ? 0 : code) | part << field.shift;
    }
  }
}

// `n` is the block's length, which a compiler that knows it makes whole vectors of. Three passes, since the
// step is known after the second; the block stays in the first-level cache.
template <int kBits>
DEAR_INLINED uint32_t quantize_block(const float* __restrict values, float* __restrict error, int64_t n,
                                     float factor, uint32_t* __restrict fields,
                                     uint16_t* __restrict step_half) {
  uint32_t dropped = 0;
  int32_t largest = 0;  // the bits of magnitudes order as whole numbers do
  for (int64_t i = 0; i < n; ++i) {
    const float sum = values[i] + error[i];
    const bool kept = within(sum, kLargestLevelled);
    const float corrected = kept ? sum : error[i];
    dropped += kept ? 0u : 1u;
    largest = std::max(largest, static_cast<int32_t>(float_bits(corrected) & ~kSignBit));
    error[i] = corrected;
  }
  const float to_whole = magnitude_factor(static_cast<uint32_t>(largest));
  int32_t sum = 0;
  int32_t squares = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t magnitude = magnitude_of(error[i], to_whole);
    sum += magnitude;
    squares += magnitude * magnitude;
  }
  const float step = level_step<kBits>(static_cast<uint32_t>(largest), sum, squares, factor);
  const float inverse = inverse_step(step);
  *step_half = static_cast<uint16_t>(float_bits(step) >> 16);
  alignas(64) uint32_t codes[kScaleBlock];
  for (int64_t i = 0; i < n; ++i) {
    const Levelled rounded = level_of<kBits>(error[i], inverse);
    codes[i] = rounded.code;
    error[i] -= rounded.level * step;  // the product is exact, fused or not
  }
  for (int64_t i = n; i < kScaleBlock; ++i) codes[i] = level_limit(kBits);  // 0
  pack_field<kBits, 0>(codes, fields);
  if constexpr (field_count(kBits) > 1) pack_field<kBits, 1>(codes, fields);
  return dropped;
}

template <int kBits>
DEAR_INLINED int64_t quantize(const float* values, float* error, int64_t n, float factor, uint32_t* fields,
                              uint16_t* steps) {
  int64_t dropped = 0;
  over_scale_blocks(n, [&](int64_t begin, int64_t length) __attribute__((always_inline)) {
    const int64_t block = begin / kScaleBlock;
    dropped += quantize_block<kBits>(values + begin, error + begin, length, factor,
                                     fields + block * block_words(kBits), steps + block);
  });
  return dropped;
}

template <int kBits, bool kFirst>
DEAR_INLINED void add_block(const uint32_t* __restrict fields, float step, int64_t n,
                            float* __restrict total) {
  alignas(64) uint32_t codes[kScaleBlock];
  unpack_field<kBits, 0>(fields, codes);
  if constexpr (field_count(kBits) > 1) unpack_field<kBits, 1>(fields, codes);
  for (int64_t i = 0; i < n; ++i) {
    const float value = level_value<kBits>(codes[i]) * step;
    total[i] = (kFirst ? 0.0f : total[i]) + value;
  }
}

template <int kBits, bool kFirst>
DEAR_INLINED void add_blocks(const uint32_t* fields, const uint16_t* steps, float factor, int64_t n,
                             float* total) {
  over_scale_blocks(n, [&](int64_t begin, int64_t length) __attribute__((always_inline)) {
    const int64_t block = begin / kScaleBlock;
    const float step = bfloat16_value(steps[block]) * factor;
    add_block<kBits, kFirst>(fields + block * block_words(kBits), step, length, total + begin);
  });
}

}  // namespace

#define DEAR_LEVELS_LOOPS(bits)                                                                         \
  DEAR_CLONES int64_t quantize_##bits(const float* values, float* error, int64_t n, float factor,       \
                                      uint32_t* fields, uint16_t* steps) {                              \
    return quantize<bits>(values, error, n, factor, fields, steps);                                     \
  }                                                                                                     \
  DEAR_CLONES void first_##bits(const uint32_t* fields, const uint16_t* steps, float factor, int64_t n, \
                                float* total) {                                                         \
    add_blocks<bits, true>(fields, steps, factor, n, total);                                            \
  }                                                                                                     \
  DEAR_CLONES void next_##bits(const uint32_t* fields, const uint16_t* steps, float factor, int64_t n,  \
                               float* total) {                                                          \
    add_blocks<bits, false>(fields, steps, factor, n, total);                                           \
  }
DEAR_LEVELS_LOOPS(2)
DEAR_LEVELS_LOOPS(3)
DEAR_LEVELS_LOOPS(4)
#undef DEAR_LEVELS_LOOPS

const LevelsLoops& levels_loops(int bits) {
  static const LevelsLoops loops[] = {
      {quantize_2, first_2, next_2}, {quantize_3, first_3, next_3}, {quantize_4, first_4, next_4}};
  return loops[bits - 2];
}

}  // namespace dear::compress::cpu
