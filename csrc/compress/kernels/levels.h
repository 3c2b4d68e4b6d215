// One element in 2, 3 or 4 bits and back, for host and device: the same bits on both. See Note [Few bits on
// the wire].
#pragma once

#include <cstdint>

#include "compress/kernels/scaled_rows.h"

namespace dear::compress {

DEAR_HOST_DEVICE constexpr int level_limit(int bits) { return (1 << (bits - 1)) - 1; }

// A part of a code: so many bits of it, from `shift` on. Its words begin at `words` of those of its block.
struct Field {
  int width;
  int shift;
  int words;

  DEAR_HOST_DEVICE constexpr int word_count() const { return static_cast<int>(kScaleBlock) / 32 * width; }
  DEAR_HOST_DEVICE constexpr int places() const { return 32 / width; }
  DEAR_HOST_DEVICE constexpr uint32_t mask() const { return (1u << width) - 1; }
};

DEAR_HOST_DEVICE constexpr int field_count(int bits) { return bits == 3 ? 2 : 1; }
DEAR_HOST_DEVICE constexpr Field field_of(int bits, int number) {
  if (bits != 3) return {bits, 0, 0};
  return number == 0 ? Field{2, 0, 0} : Field{1, 2, static_cast<int>(kScaleBlock) / 32 * 2};
}
DEAR_HOST_DEVICE constexpr int64_t block_words(int bits) { return kScaleBlock / 32 * bits; }

// Magnitudes as whole numbers below 2^11, of which the block's largest has 11 bits: sums of them and of their
// squares are exact, in whatever order.
constexpr int kMagnitudeBits = 11;

DEAR_HOST_DEVICE inline bool levelled(uint32_t largest_bits) {
  return largest_bits >= static_cast<uint32_t>(127 - 100) << 23;  // kSmallestLevelled
}
DEAR_HOST_DEVICE inline float magnitude_factor(uint32_t largest_bits) {
  const uint32_t exponent = largest_bits >> 23;
  return levelled(largest_bits) ? float_of((254 + (kMagnitudeBits - 1) - exponent) << 23) : 0.0f;
}
DEAR_HOST_DEVICE inline int32_t magnitude_of(float value, float factor) {
  return static_cast<int32_t>(float_of(bits_of(value) & 0x7fffffffu) * factor);
}

// The step of a block, from its largest magnitude, the sum of the magnitudes and that of their squares.
//
// Sum of squares by sum, times a constant, is near the step that loses least: of a normal distribution, where
// the constants come from, and likewise where most elements of a block are zero, or few are far larger than
// the others.
template <int kBits>
DEAR_HOST_DEVICE inline float level_step(uint32_t largest_bits, int32_t sum, int32_t squares) {
  if (!levelled(largest_bits)) return 0.0f;
  const float factor = kBits == 2 ? 0.98f : kBits == 3 ? 0.5625f : 0.3125f;
  const float unit = float_of(((largest_bits >> 23) - (kMagnitudeBits - 1)) << 23);
  const float fine = static_cast<float>(squares) / static_cast<float>(sum) * factor * unit;
  const float coarse = float_of(largest_bits) / static_cast<float>(level_limit(kBits));
  const float step = fine < coarse ? fine : coarse;
  return float_of((bits_of(step) + 0x8000u) & 0xffff0000u);
}

DEAR_HOST_DEVICE inline float inverse_step(float step) { return step > 0 ? 1.0f / step : 0.0f; }

// The level nearest to a value by the inverse of its step, as a code and as a number.
struct Levelled {
  uint32_t code;
  float level;
};

template <int kBits>
DEAR_HOST_DEVICE inline Levelled level_of(float value, float inverse) {
  const float limit = static_cast<float>(level_limit(kBits));
  const float scaled = value * inverse;
  const float above = scaled > -limit ? scaled : -limit;
  const float within = above < limit ? above : limit;
  const float from = 0x1.8p23f;  // floats are 1 apart from here on: the sum is rounded to a whole number
  const float sum = within + from;
  return {(bits_of(sum) + static_cast<uint32_t>(level_limit(kBits))) & ((1u << kBits) - 1), sum - from};
}

template <int kBits>
DEAR_HOST_DEVICE inline float level_value(uint32_t code) {
  return static_cast<float>(static_cast<int32_t>(code) - level_limit(kBits));
}

}  // namespace dear::compress
