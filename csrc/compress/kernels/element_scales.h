// A scale for each element of a block, for host and device: the same bits on both. See Note [A scale for each
// element].
#pragma once

#include <cstdint>

#include "compress/kernels/scaled_rows.h"

namespace dear::compress {

// Roots are added up as whole numbers, of which the block's largest is 2^kRootBits: exact in whatever order.
constexpr int kRootBits = 16;
// No scale is below the block's mean root by more than 2^kBelowMean.
constexpr int32_t kBelowMean = 3;
// What the square of a new result weighs in the running mean.
constexpr float kNewWeight = 0x1p-4f;
// A larger result would overflow when it is squared; a smaller mean square counts as none.
constexpr float kLargestResult = 0x1p60f;
constexpr float kSmallestSquare = 0x1p-100f;

// The exponent, plus 64, of the power of two next below the root of a mean square.
DEAR_HOST_DEVICE inline int32_t root_exponent(float square) {
  return static_cast<int32_t>((bits_of(square) >> 23) + 1) >> 1;
}

// A root's share of the block's sum, in which the largest counts 2^kRootBits.
DEAR_HOST_DEVICE inline int32_t root_share(int32_t exponent, int32_t largest) {
  const int32_t distance = largest - exponent;
  return (int32_t{1} << kRootBits) >> (distance < 31 ? distance : 31);
}

// The exponent of the least scale of a block of `count` elements, from the sum of the shares.
DEAR_HOST_DEVICE inline int32_t least_exponent(int32_t largest, int32_t sum, int32_t count) {
  const auto mean = static_cast<float>(sum / count);
  return largest - kRootBits + static_cast<int32_t>(bits_of(mean) >> 23) - 127 - kBelowMean;
}

// A power of two from 1 to 2^10: the mean of up to 128 roots is no less than the largest / 128.
DEAR_HOST_DEVICE inline float scale_of_element(int32_t exponent, int32_t least) {
  const int32_t above = exponent > least ? exponent - least : 0;
  return float_of(static_cast<uint32_t>(127 + above) << 23);
}

// 1 / scale, for a power of two.
DEAR_HOST_DEVICE inline float inverse_of_power(float scale) {
  return float_of((254u << 23) - bits_of(scale));
}

// The running mean of squares, with one result more. A result has at most 12 bits, so that its square is
// exact; the weight is a power of two: fused or not, the bits are the same. Magnitudes are compared by their
// bits, which compilers make vector instructions of.
DEAR_HOST_DEVICE inline float with_result(float square, float result) {
  const auto largest = static_cast<int32_t>(bits_of(kLargestResult));
  const auto size = static_cast<int32_t>(bits_of(result) & 0x7fffffffu);
  const float held = float_of(static_cast<uint32_t>(size < largest ? size : largest));
  const float next = square + (held * held - square) * kNewWeight;
  const auto bits = static_cast<int32_t>(bits_of(next));
  return float_of(static_cast<uint32_t>(bits < static_cast<int32_t>(bits_of(kSmallestSquare)) ? 0 : bits));
}

}  // namespace dear::compress
