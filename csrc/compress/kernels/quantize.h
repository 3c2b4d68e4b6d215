// One element in eight bits and back, for host and device: the same bits on both. See Note [Eight bits on the
// wire].
#pragma once

#include <cstdint>
#include <cstring>

#include "compress/layout.h"

namespace dear::compress {

// int8: whole numbers from -127 to 127. float8: sign, four bits of exponent, three of mantissa (e4m3fn), up
// to 448.
enum class CodeType : int { kInt8, kFloat8 };

// Rows of a payload, one for each owner: `stride` words apart, each of a shard of so many elements.
struct Rows {
  int64_t count;
  int64_t stride;
  int64_t shard;
};

// To the nearest code, ties to even; or, given a key, up or down at random such that the mean is right. What
// is drawn depends on the key and the element's index alone.
struct Rounding {
  bool stochastic;
  uint32_t key;
};

DEAR_HOST_DEVICE inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

DEAR_HOST_DEVICE inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

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

// Whether a value goes up to the next code: it lies `rest` of the way there, from a code that is odd or even.
DEAR_HOST_DEVICE inline bool goes_up(float rest, bool odd, Rounding rounding, uint32_t index) {
  const bool nearer = rest > 0.5f || (rest == 0.5f && odd);
  return rounding.stochastic ? rest > uniform(index, rounding.key) : nearer;
}

// The byte of a value between -127 and 127.
DEAR_HOST_DEVICE inline uint32_t int8_code(float value, Rounding rounding, uint32_t index) {
  const int32_t whole = static_cast<int32_t>(value);  // toward zero
  const int32_t below = whole - (static_cast<float>(whole) > value ? 1 : 0);
  const float rest = value - static_cast<float>(below);
  const int32_t code = below + (goes_up(rest, (below & 1) != 0, rounding, index) ? 1 : 0);
  return static_cast<uint32_t>(code) & 0xffu;
}

DEAR_HOST_DEVICE inline float int8_value(uint32_t code) {
  return static_cast<float>(static_cast<int32_t>(static_cast<int8_t>(code)));
}

// The byte of a value between -448 and 448. From 2^-6 on, three bits of the mantissa stay; below are the
// multiples of 2^-9.
DEAR_HOST_DEVICE inline uint32_t float8_code(float value, Rounding rounding, uint32_t index) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const float scaled = float_of(magnitude) * 0x1p9f;
  const int32_t whole = static_cast<int32_t>(scaled);
  const bool small = magnitude < (121u << 23);
  const float small_rest = scaled - static_cast<float>(whole);
  const float large_rest = static_cast<float>(static_cast<int32_t>(magnitude & 0xfffffu)) * 0x1p-20f;
  const uint32_t below = small ? static_cast<uint32_t>(whole) : (magnitude >> 20) - (120u << 3);
  const float rest = small ? small_rest : large_rest;
  return (bits >> 24 & 0x80u) | (below + (goes_up(rest, (below & 1) != 0, rounding, index) ? 1u : 0u));
}

DEAR_HOST_DEVICE inline float float8_value(uint32_t code) {
  const uint32_t magnitude = code & 0x7fu;
  const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f;
  const float large = float_of((magnitude << 20) + (120u << 23));
  const float value = magnitude < 8 ? small : large;
  return float_of(bits_of(value) | (code & 0x80u) << 24);
}

template <CodeType kType>
DEAR_HOST_DEVICE inline uint32_t code_of(float value, Rounding rounding, uint32_t index) {
  return kType == CodeType::kInt8 ? int8_code(value, rounding, index) : float8_code(value, rounding, index);
}

template <CodeType kType>
DEAR_HOST_DEVICE inline float value_of(uint32_t code) {
  return kType == CodeType::kInt8 ? int8_value(code) : float8_value(code);
}

}  // namespace dear::compress
