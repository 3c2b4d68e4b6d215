#include "compress/kernels/cpu/streamed.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define DEAR_STREAMS 1
#include <immintrin.h>
#endif

namespace dear::compress::cpu {

namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kLineFloats = kLine / static_cast<int64_t>(sizeof(float));

#ifdef DEAR_STREAMS
// Whole lines, to a target that begins with one. The wider the store, the fewer lines are under way half
// written.
using StreamLines = void (*)(const float* source, int64_t n, float* target);

__attribute__((target("avx512f"))) void stream_by_16(const float* source, int64_t n, float* target) {
  for (int64_t i = 0; i < n; i += 16) _mm512_stream_ps(target + i, _mm512_loadu_ps(source + i));
}

__attribute__((target("avx"))) void stream_by_8(const float* source, int64_t n, float* target) {
  for (int64_t i = 0; i < n; i += 8) _mm256_stream_ps(target + i, _mm256_loadu_ps(source + i));
}

void stream_by_4(const float* source, int64_t n, float* target) {
  for (int64_t i = 0; i < n; i += 4) _mm_stream_ps(target + i, _mm_loadu_ps(source + i));
}

StreamLines widest() {
  if (__builtin_cpu_supports("avx512f")) return stream_by_16;
  return __builtin_cpu_supports("avx") ? stream_by_8 : stream_by_4;
}
#endif

}  // namespace

#ifdef DEAR_STREAMS
void store_streamed(const float* source, int64_t n, float* target) {
  static const StreamLines stream = widest();
  const auto inside = static_cast<int64_t>(reinterpret_cast<uintptr_t>(target) % kLine / sizeof(float));
  const int64_t head = std::min((kLineFloats - inside) % kLineFloats, n);
  const int64_t whole = (n - head) / kLineFloats * kLineFloats;
  std::memcpy(target, source, static_cast<size_t>(head) * sizeof(float));
  stream(source + head, whole, target + head);
  const int64_t rest = head + whole;
  std::memcpy(target + rest, source + rest, static_cast<size_t>(n - rest) * sizeof(float));
}

StreamFence::~StreamFence() { _mm_sfence(); }
#else
void store_streamed(const float* source, int64_t n, float* target) {
  std::memcpy(target, source, static_cast<size_t>(n) * sizeof(float));
}

StreamFence::~StreamFence() = default;
#endif

}  // namespace dear::compress::cpu
