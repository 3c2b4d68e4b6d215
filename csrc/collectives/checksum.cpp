#include "collectives/checksum.h"

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

namespace dear {
namespace {

// The table of CRC32C (Castagnoli), by byte, and for eight bytes at a time.
constexpr uint32_t kPolynomial = 0x82f63b78u;
using Tables = std::array<std::array<uint32_t, 256>, 8>;

constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? kPolynomial : 0);
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

inline uint64_t table_word(uint64_t crc, uint64_t word) {
  word ^= crc;
  uint32_t next = 0;
  for (size_t byte = 0; byte < 8; ++byte) next ^= kTables[7 - byte][(word >> (8 * byte)) & 0xff];
  return next;
}

inline uint64_t table_byte(uint64_t crc, uint8_t byte) {
  return (crc >> 8) ^ kTables[0][(crc ^ byte) & 0xff];
}

// One body for the instruction and for the table: a function that may use the instruction cannot be inlined
// into one that may not, so a template would not do.
#define DEAR_CHECKSUM(NAME, TARGET, WORD, BYTE)                        \
  TARGET uint32_t NAME(const void* data, size_t size, uint32_t seed) { \
    const auto* at = static_cast<const unsigned char*>(data);          \
    uint64_t crcs[3] = {~seed, ~seed, ~seed};                          \
    for (; size >= 24; size -= 24, at += 24) {                         \
      uint64_t words[3];                                               \
      std::memcpy(words, at, sizeof(words));                           \
      crcs[0] = WORD(crcs[0], words[0]);                               \
      crcs[1] = WORD(crcs[1], words[1]);                               \
      crcs[2] = WORD(crcs[2], words[2]);                               \
    }                                                                  \
    uint64_t crc = WORD(crcs[0], crcs[1] | (crcs[2] << 32));           \
    for (; size > 0; --size, ++at) crc = BYTE(crc, *at);               \
    return ~static_cast<uint32_t>(crc);                                \
  }

DEAR_CHECKSUM(by_table, , table_word, table_byte)

#if defined(__x86_64__)
#define DEAR_X86_BYTE(crc, byte) _mm_crc32_u8(static_cast<uint32_t>(crc), byte)
DEAR_CHECKSUM(by_instruction, DEAR_CRC_TARGET, _mm_crc32_u64, DEAR_X86_BYTE)
bool has_instruction() { return __builtin_cpu_supports("sse4.2") != 0; }
#elif defined(DEAR_CRC_TARGET)
#define DEAR_ARM_WORD(crc, word) __crc32cd(static_cast<uint32_t>(crc), word)
#define DEAR_ARM_BYTE(crc, byte) __crc32cb(static_cast<uint32_t>(crc), byte)
DEAR_CHECKSUM(by_instruction, DEAR_CRC_TARGET, DEAR_ARM_WORD, DEAR_ARM_BYTE)
bool has_instruction() { return (::getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }
#endif

}  // namespace

uint32_t checksum(const void* data, size_t size, uint32_t seed) {
#ifdef DEAR_CRC_TARGET
  static const bool instruction = has_instruction();
  if (instruction) return by_instruction(data, size, seed);
#endif
  return by_table(data, size, seed);
}

uint32_t checksum_by_table(const void* data, size_t size, uint32_t seed) {
  return by_table(data, size, seed);
}

}  // namespace dear
