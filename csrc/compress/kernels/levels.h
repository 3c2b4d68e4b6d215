// One element in 2, 3 or 4 bits and back, for host and device: the same bits on both. See Note [Few bits on
// the wire].
#pragma once

#include <cmath>
#include <cstdint>

#include "compress/kernels/scaled_rows.h"

namespace dear::compress {

// Levels on each side of 0, and the outermost of them, in steps. In 3 bits they are 0, 1, 2 and 4: most
// elements are small, and finer steps for them are worth a wider gap between the outer two.
DEAR_HOST_DEVICE constexpr int level_limit(int bits) { return (1 << (bits - 1)) - 1; }
DEAR_HOST_DEVICE constexpr int level_reach(int bits) { return bits == 3 ? 4 : level_limit(bits); }

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
// the others. Where elements have scales of their own, the step is coarser: what is cut off comes several
// steps late, and what is rounded one, so that losing least at once is not best at large learning rates.
DEAR_HOST_DEVICE constexpr float level_factor(int bits, bool scaled) {
  if (scaled) return bits == 2 ? 0.98f : bits == 3 ? 0.5f : 0.625f;
  return bits == 2 ? 0.98f : bits == 3 ? 0.4375f : 0.3125f;
}
template <int kBits>
DEAR_HOST_DEVICE inline float level_step(uint32_t largest_bits, int32_t sum, int32_t squares, float factor) {
  if (!levelled(largest_bits)) return 0.0f;
  const float unit = float_of(((largest_bits >> 23) - (kMagnitudeBits - 1)) << 23);
  const float fine = static_cast<float>(squares) / static_cast<float>(sum) * factor * unit;
  const float coarse = float_of(largest_bits) / static_cast<float>(level_reach(kBits));
  const float step = fine < coarse ? fine : coarse;
  return float_of((bits_of(step) + 0x8000u) & 0xffff0000u);
}

DEAR_HOST_DEVICE inline float inverse_step(float step) { return step > 0 ? 1.0f / step : 0.0f; }

// The level nearest to a value by the inverse of its step, as a code and as a number.
struct Levelled {
  uint32_t code;
  float level;
};

// Rounded by an instruction of its own: a sum with a large number would be fused with the product on some
// processors, and rounded once there. No element is more than 64 steps, so that it fits.
template <int kBits>
DEAR_HOST_DEVICE inline Levelled level_of(float value, float inverse) {
  const float quotient = value * inverse;
  const int32_t limit = level_limit(kBits);
  const int32_t nearest = kBits == 3 ? limit - 1 : limit;  // of the levels that are a step apart
  int32_t level = static_cast<int32_t>(rintf(quotient));
  level = level > nearest ? nearest : level;
  level = level < -nearest ? -nearest : level;
  const int32_t outermost = kBits == 3 ? (quotient >= 3 ? 1 : 0) - (quotient <= -3 ? 1 : 0) : 0;
  return {static_cast<uint32_t>(level + outermost + limit), static_cast<float>(level + 2 * outermost)};
}

template <int kBits>
DEAR_HOST_DEVICE inline float level_value(uint32_t code) {
  const int32_t level = static_cast<int32_t>(code) - level_limit(kBits);
  const int32_t outermost = kBits == 3 ? (level == 3 ? 1 : 0) - (level == -3 ? 1 : 0) : 0;
  return static_cast<float>(level + outermost);
}

}  // namespace dear::compress
