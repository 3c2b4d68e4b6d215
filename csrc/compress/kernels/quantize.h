// One element in eight bits and back, for host and device: the same bits on both. See Note [Eight bits on the
// wire].
#pragma once

#include <cstdint>

#include "compress/kernels/scaled_rows.h"

namespace dear::compress {

// int8: whole numbers from -127 to 127. float8: sign, four bits of exponent, three of mantissa (e4m3fn), up
// to 448.
enum class CodeType : int { kInt8, kFloat8 };

// To the nearest code, ties to even; or, given a key, up or down at random such that the mean is right. What
// is drawn depends on the key and the element's index alone.
struct Rounding {
  bool stochastic;
  uint32_t key;
};

// The byte of the smallest scale, of those that are normal floats, by which a largest magnitude of these bits
// is within the codes' range. 127 is 1.984375 * 2^6, and 448 is 1.75 * 2^8.
DEAR_HOST_DEVICE inline uint32_t scale_byte(uint32_t largest_bits, CodeType type) {
  const uint32_t mantissa = type == CodeType::kInt8 ? 0x7e0000u : 0x600000u;
  const int32_t exponent = type == CodeType::kInt8 ? 6 : 8;
  const int32_t above = (largest_bits & 0x7fffffu) > mantissa ? 1 : 0;
  const int32_t byte = static_cast<int32_t>(largest_bits >> 23) - exponent + above;
  return largest_bits == 0 ? 0u : byte < 1 ? 1u : static_cast<uint32_t>(byte);
}

DEAR_HOST_DEVICE inline float scale_of(uint32_t byte) { return float_of(byte << 23); }
DEAR_HOST_DEVICE inline float inverse_scale_of(uint32_t byte) { return float_of((254u - byte) << 23); }

// Uniform in [0, 1), a multiple of 2^-24: the finaliser of a hash of 32 bits.
DEAR_HOST_DEVICE inline float uniform(uint32_t index, uint32_t key) {
  uint32_t x = index * 0x9e3779b9u + key;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return static_cast<float>(static_cast<int32_t>(x >> 8)) * 0x1p-24f;
}

// What a value is rounded to: its byte, and what that says. Both are computed without a branch, so that loops
// over them become vector instructions.
struct Rounded {
  uint32_t code;
  float value;
};

// Of a value between -127 and 127.
DEAR_HOST_DEVICE inline Rounded round_to_int8(float value, Rounding rounding, uint32_t index) {
  if (rounding.stochastic) {
    const int32_t cut = static_cast<int32_t>(value);  // toward zero
    const int32_t below = cut - (static_cast<float>(cut) > value ? 1 : 0);
    const float rest = value - static_cast<float>(below);
    const int32_t whole = below + (rest > uniform(index, rounding.key) ? 1 : 0);
    return {static_cast<uint32_t>(whole) & 0xffu, static_cast<float>(whole)};
  }
  // Floats are 1 apart from here on, so the sum is rounded to a whole number, which its last bits say.
  const float from = 0x1.8p23f;
  const float sum = value + from;
  return {bits_of(sum) & 0xffu, sum - from};
}

// Of a value between -448 and 448. Codes of values from 2^e on, up to 2^(e + 1), are 2^(e - 3) apart; those
// of values below 2^-6 are 2^-9 apart. So a code is a number of such steps, behind those of the exponents
// below.
DEAR_HOST_DEVICE inline Rounded round_to_float8(float value, Rounding rounding, uint32_t index) {
  const uint32_t smallest = 121u << 23;  // 2^-6
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t own = magnitude & 0x7f800000u;
  const uint32_t exponent = own > smallest ? own : smallest;
  uint32_t steps;
  float rounded;
  if (rounding.stochastic) {
    const float scaled = float_of(magnitude) * float_of((257u << 23) - exponent);
    const int32_t below = static_cast<int32_t>(scaled);
    const float rest = scaled - static_cast<float>(below);
    const int32_t whole = below + (rest > uniform(index, rounding.key) ? 1 : 0);
    steps = static_cast<uint32_t>(whole);
    rounded = static_cast<float>(whole) * float_of(exponent - (3u << 23));
  } else {
    const uint32_t from = exponent + (20u << 23);  // from 2^(e + 20) on, floats are 2^(e - 3) apart
    const float sum = float_of(magnitude) + float_of(from);
    steps = bits_of(sum) - from;
    rounded = sum - float_of(from);
  }
  const uint32_t sign = bits & 0x80000000u;
  return {(sign >> 24) | (((exponent - smallest) >> 20) + steps), float_of(bits_of(rounded) | sign)};
}

DEAR_HOST_DEVICE inline float int8_value(uint32_t code) {
  return static_cast<float>(static_cast<int32_t>(static_cast<int8_t>(code)));
}

// Below 2^-6 the code is read as one of the values above it, by which it is then too large.
DEAR_HOST_DEVICE inline float float8_value(uint32_t code) {
  const uint32_t magnitude = code & 0x7fu;
  const bool small = magnitude < 8;
  const uint32_t read = small ? magnitude | 8u : magnitude;
  const uint32_t excess = small ? 121u << 23 : 0u;
  const float value = float_of((read << 20) + (120u << 23)) - float_of(excess);
  return float_of(bits_of(value) | (code & 0x80u) << 24);
}

template <CodeType kType>
DEAR_HOST_DEVICE inline Rounded round_to(float value, Rounding rounding, uint32_t index) {
  return kType == CodeType::kInt8 ? round_to_int8(value, rounding, index)
                                  : round_to_float8(value, rounding, index);
}

template <CodeType kType>
DEAR_HOST_DEVICE inline uint32_t code_of(float value, Rounding rounding, uint32_t index) {
  return round_to<kType>(value, rounding, index).code;
}

template <CodeType kType>
DEAR_HOST_DEVICE inline float value_of(uint32_t code) {
  return kType == CodeType::kInt8 ? int8_value(code) : float8_value(code);
}

}  // namespace dear::compress
