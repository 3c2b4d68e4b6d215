#pragma once

#include <cstddef>
#include <cstdint>

// The arithmetic of CRC32C (Castagnoli), at compile time: bytes as polynomials over two elements, modulo one
// of degree 32. Reflected: the lowest bit of the first byte has the highest power, bit 31 of a remainder
// is 1.
namespace dear::crc32c {

constexpr uint32_t kPolynomial = 0x82f63b78u;

constexpr uint32_t times_x(uint32_t value) { return (value >> 1) ^ ((value & 1) != 0 ? kPolynomial : 0); }

// x to the power of `exponent`.
constexpr uint32_t power_of_x(int exponent) {
  uint32_t value = 0x80000000u;
  for (int i = 0; i < exponent; ++i) value = times_x(value);
  return value;
}

constexpr uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (int bit = 31; bit >= 0; --bit, b = times_x(b)) {
    if ((a >> bit & 1) != 0) product ^= b;
  }
  return product;
}

// What follows goes on from the remainder `crc` over `size` bytes more, without the inversions at both ends.
using Extend = uint32_t (*)(uint32_t crc, const unsigned char* data, size_t size);

// The ways there are on this processor; null where there is none.
Extend by_table();
Extend by_instruction();
Extend by_folding();

}  // namespace dear::crc32c
