#include "collectives/crc32c.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>
#define DEAR_FOLD_TARGET __attribute__((target("avx512f,vpclmulqdq,sse4.2")))
#endif

namespace dear::crc32c {

#if defined(__x86_64__)
namespace {

// Note [Folding]
// 16 bytes followed by D bits have the same remainder as two products of 8 bytes with powers of x, shifted to
// the place of the 16 bytes D bits further on: a message is folded from its front into its last bytes, four
// times 64 bytes at a time, without a reduction. A carry-less product of reflected numbers comes out shifted
// by one bit, which the factors make up for.
constexpr uint64_t fold_factor(int bits) { return static_cast<uint64_t>(power_of_x(bits)) << 1; }

template <int kBits>
DEAR_FOLD_TARGET inline __m512i factors() {
  constexpr auto kFirst = static_cast<int64_t>(fold_factor(kBits + 32));   // of the first 8 bytes
  constexpr auto kSecond = static_cast<int64_t>(fold_factor(kBits - 32));  // of the second
  return _mm512_set_epi64(kSecond, kFirst, kSecond, kFirst, kSecond, kFirst, kSecond, kFirst);
}

DEAR_FOLD_TARGET inline __m512i load(const unsigned char* at) { return _mm512_loadu_si512(at); }

// `sum`, moved by the distance of `by`, and `next`.
DEAR_FOLD_TARGET inline __m512i fold(__m512i sum, __m512i by, __m512i next) {
  constexpr int kXor = 0x96;  // of three
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(sum, by, 0x00),
                                   _mm512_clmulepi64_epi128(sum, by, 0x11), next, kXor);
}

DEAR_FOLD_TARGET uint32_t extend_by_folding(uint32_t crc, const unsigned char* at, size_t size) {
  uint64_t rest = crc;
  if (size >= 256) {
    const __m512i before = _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc)));
    __m512i sums[4] = {_mm512_xor_si512(load(at), before), load(at + 64), load(at + 128), load(at + 192)};
    const __m512i far = factors<2048>();
    for (at += 256, size -= 256; size >= 256; at += 256, size -= 256) {
      for (int i = 0; i < 4; ++i) sums[i] = fold(sums[i], far, load(at + 64 * i));
    }
    const __m512i near = factors<512>();
    for (int i = 1; i < 4; ++i) sums[i] = fold(sums[i - 1], near, sums[i]);
    uint64_t words[8];
    std::memcpy(words, &sums[3], sizeof(words));
    rest = 0;
    for (const uint64_t word : words) rest = _mm_crc32_u64(rest, word);
  }
  for (; size >= 8; size -= 8, at += 8) {
    uint64_t word;
    std::memcpy(&word, at, sizeof(word));
    rest = _mm_crc32_u64(rest, word);
  }
  auto last = static_cast<uint32_t>(rest);
  for (; size > 0; --size, ++at) last = _mm_crc32_u8(last, *at);
  return last;
}

}  // namespace

Extend by_folding() {
  const bool there = __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("vpclmulqdq") != 0 &&
                     __builtin_cpu_supports("sse4.2") != 0;
  return there ? extend_by_folding : nullptr;
}
#else
Extend by_folding() { return nullptr; }
#endif

}  // namespace dear::crc32c
