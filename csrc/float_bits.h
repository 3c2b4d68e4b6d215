// Floats by their bits: what a compiler vectorises, and no flag about finite arithmetic can remove.
#pragma once

#include <cstdint>
#include <cstring>

namespace dear {

constexpr uint32_t kSignBit = 0x80000000u;
constexpr uint32_t kInfinity = 0x7f800000u;

// std::bit_cast, which C++17 lacks.
inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline bool is_finite(float value) { return (float_bits(value) & kInfinity) != kInfinity; }

// |value| <= limit, false for NaN. Of the largest float: whether the value is finite.
inline bool within(float value, float limit) { return (float_bits(value) & ~kSignBit) <= float_bits(limit); }

// bfloat16 in place of the class's conversions, which no compiler vectorises. To nearest even; NaN stays NaN.
inline float bfloat16_value(uint16_t bits) { return bits_float(static_cast<uint32_t>(bits) << 16); }

inline uint16_t bfloat16_bits(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & ~kSignBit) > kInfinity;
  return static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
}

}  // namespace dear
