// How the CPU kernels are vectorised: plain loops over whole blocks, compiled once per instruction set by
// DEAR_CLONES and chosen when the module is loaded. It compiles to the plain loop where that is not
// supported.
#pragma once

#include <cstdint>
#include <cstring>

// Sanitizers run their own start-up code after the loader has resolved the clones: they get the plain loop.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define DEAR_HAS_CLONES 1
#define DEAR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DEAR_CLONES
#endif

// Lets the sums named run in separate lanes, which the rules of float addition otherwise forbid.
#define DEAR_PRAGMA(text) _Pragma(#text)
#ifdef _OPENMP
#define DEAR_SIMD_SUM(...) DEAR_PRAGMA(omp simd reduction(+ : __VA_ARGS__))
#else
#define DEAR_SIMD_SUM(...)
#endif

namespace dear::compress::cpu {

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

// Tested on the bits, so that no compiler flag about finite arithmetic can remove the test.
inline bool is_finite(float value) { return (float_bits(value) & kInfinity) != kInfinity; }

// |value| <= limit, false for NaN. Of the largest float: whether the value is finite.
inline bool within(float value, float limit) { return (float_bits(value) & ~kSignBit) <= float_bits(limit); }

}  // namespace dear::compress::cpu
