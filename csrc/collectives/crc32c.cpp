#include "collectives/crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#define DEAR_CRC_TARGET __attribute__((target("sse4.2")))
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#define DEAR_CRC_TARGET __attribute__((target("+crc")))
#endif

namespace dear::crc32c {
namespace {

// By byte, and for eight bytes at a time.
using Tables = std::array<std::array<uint32_t, 256>, 8>;

constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = times_x(crc);
    tables[0][byte] = crc;
  }
  for (size_t ahead = 1; ahead < 8; ++ahead) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[ahead - 1][byte];
      tables[ahead][byte] = (before >> 8) ^ tables[0][before & 0xff];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

uint32_t extend_by_table(uint32_t crc, const unsigned char* at, size_t size) {
  for (; size >= 8; size -= 8, at += 8) {
    uint64_t word;
    std::memcpy(&word, at, sizeof(word));
    word ^= crc;
    crc = 0;
    for (size_t byte = 0; byte < 8; ++byte) crc ^= kTables[7 - byte][(word >> (8 * byte)) & 0xff];
  }
  for (; size > 0; --size, ++at) crc = (crc >> 8) ^ kTables[0][(crc ^ *at) & 0xff];
  return crc;
}

#ifdef DEAR_CRC_TARGET

#if defined(__x86_64__)
#define DEAR_CRC_WORD(crc, word) static_cast<uint32_t>(_mm_crc32_u64(crc, word))
#define DEAR_CRC_BYTE(crc, byte) _mm_crc32_u8(crc, byte)
bool has_instruction() { return __builtin_cpu_supports("sse4.2") != 0; }
#else
#define DEAR_CRC_WORD(crc, word) __crc32cd(crc, word)
#define DEAR_CRC_BYTE(crc, byte) __crc32cb(crc, byte)
bool has_instruction() { return (::getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }
#endif

// The instruction takes one cycle, and its result comes after three: so three stretches go side by side, and
// the remainder of each is moved behind the next one.
constexpr size_t kStretch = 1024;

using Shift = std::array<std::array<uint32_t, 256>, 4>;

constexpr Shift make_shift() {
  Shift shift{};
  const uint32_t by = power_of_x(8 * kStretch);
  for (int place = 0; place < 4; ++place) {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      shift[static_cast<size_t>(place)][byte] = multiply(byte << (8 * place), by);
    }
  }
  return shift;
}

constexpr Shift kShift = make_shift();

// A remainder that is followed by a stretch of zeros.
inline uint32_t shifted(uint32_t crc) {
  return kShift[0][crc & 0xff] ^ kShift[1][crc >> 8 & 0xff] ^ kShift[2][crc >> 16 & 0xff] ^
         kShift[3][crc >> 24];
}

DEAR_CRC_TARGET uint32_t extend_by_instruction(uint32_t crc, const unsigned char* at, size_t size) {
  for (; size >= 3 * kStretch; size -= 3 * kStretch, at += 3 * kStretch) {
    uint32_t crcs[3] = {crc, 0, 0};
    for (size_t place = 0; place < kStretch; place += 8) {
      for (size_t i = 0; i < 3; ++i) {
        uint64_t word;
        std::memcpy(&word, at + i * kStretch + place, sizeof(word));
        crcs[i] = DEAR_CRC_WORD(crcs[i], word);
      }
    }
    crc = shifted(shifted(crcs[0]) ^ crcs[1]) ^ crcs[2];
  }
  for (; size >= 8; size -= 8, at += 8) {
    uint64_t word;
    std::memcpy(&word, at, sizeof(word));
    crc = DEAR_CRC_WORD(crc, word);
  }
  for (; size > 0; --size, ++at) crc = DEAR_CRC_BYTE(crc, *at);
  return crc;
}

#endif

}  // namespace

Extend by_table() { return extend_by_table; }

Extend by_instruction() {
#ifdef DEAR_CRC_TARGET
  if (has_instruction()) return extend_by_instruction;
#endif
  return nullptr;
}

}  // namespace dear::crc32c
