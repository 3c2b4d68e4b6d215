#include "compress/kernels/cpu/cast.h"

#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>

#include "float_bits.h"
#include "isa.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define DEAR_F16C 1
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace dear::compress::cpu {

DEAR_CLONES void bfloat16_to_float(const uint16_t* source, int64_t n, float* target) {
  for (int64_t i = 0; i < n; ++i) target[i] = bfloat16_value(source[i]);
}

DEAR_CLONES void float_to_bfloat16(const float* source, int64_t n, uint16_t* target) {
  for (int64_t i = 0; i < n; ++i) target[i] = bfloat16_bits(source[i]);
}

DEAR_CLONES void divide_values(float* values, int64_t n, float divisor) {
  for (int64_t i = 0; i < n; ++i) values[i] /= divisor;
}

DEAR_CLONES void clamp_values(const float* values, int64_t n, float limit, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = std::min(std::max(values[i], -limit), limit);
}

void half_to_float_plain(const uint16_t* source, int64_t n, float* target) {
  for (int64_t i = 0; i < n; ++i) target[i] = c10::detail::fp16_ieee_to_fp32_value(source[i]);
}

void float_to_half_plain(const float* source, int64_t n, uint16_t* target) {
  for (int64_t i = 0; i < n; ++i) target[i] = c10::detail::fp16_ieee_from_fp32_value(source[i]);
}

#ifdef DEAR_F16C
// The compiler does not find these conversions in a plain loop, so they are named.
__attribute__((target("avx,f16c"))) void half_to_float_f16c(const uint16_t* source, int64_t n,
                                                            float* target) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
    _mm256_storeu_ps(target + i, _mm256_cvtph_ps(half));
  }
  for (; i < n; ++i) target[i] = _cvtsh_ss(source[i]);
}

__attribute__((target("avx,f16c"))) void float_to_half_f16c(const float* source, int64_t n,
                                                            uint16_t* target) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), half);
  }
  for (; i < n; ++i) target[i] = _cvtss_sh(source[i], _MM_FROUND_TO_NEAREST_INT);
}

bool has_f16c() {
  // Clang before 15 knows no "f16c" by name; "avx" also says that the system keeps the registers.
  static const bool has = [] {
    unsigned int a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0 && __builtin_cpu_supports("avx");
  }();
  return has;
}
#endif

const float* load_block(const void* source, GradType type, int64_t n, float* scratch) {
  if (type == GradType::kFloat32) return static_cast<const float*>(source);
  const auto* words = static_cast<const uint16_t*>(source);
  if (type == GradType::kBFloat16) {
    bfloat16_to_float(words, n, scratch);
    return scratch;
  }
#ifdef DEAR_F16C
  if (has_f16c()) {
    half_to_float_f16c(words, n, scratch);
    return scratch;
  }
#endif
  half_to_float_plain(words, n, scratch);
  return scratch;
}

void store_block(const float* source, GradType type, int64_t n, void* target) {
  if (type == GradType::kFloat32) {
    std::memcpy(target, source, n * sizeof(float));
    return;
  }
  auto* words = static_cast<uint16_t*>(target);
  if (type == GradType::kBFloat16) {
    float_to_bfloat16(source, n, words);
    return;
  }
#ifdef DEAR_F16C
  if (has_f16c()) {
    float_to_half_f16c(source, n, words);
    return;
  }
#endif
  float_to_half_plain(source, n, words);
}

void store_within_range(float* source, GradType type, int64_t n, void* target) {
  if (type != GradType::kFloat32) clamp_values(source, n, largest(type), source);
  store_block(source, type, n, target);
}

}  // namespace dear::compress::cpu
