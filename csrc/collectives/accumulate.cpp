#include "collectives/accumulate.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>

// One body, compiled for the instruction sets that matter and chosen when the module is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__) && \
    !defined(__SANITIZE_ADDRESS__)
#define DEAR_MULTIARCH __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DEAR_MULTIARCH
#endif

namespace dear {
namespace {

template <typename T>
inline T add_scaled(T a, T b, int divisor) {
  if constexpr (std::is_integral_v<T>) {
    using U = std::make_unsigned_t<T>;
    const T sum = static_cast<T>(static_cast<U>(a) + static_cast<U>(b));
    return divisor == 1 ? sum : static_cast<T>(sum / static_cast<T>(divisor));
  } else {
    return divisor == 1 ? a + b : (a + b) / static_cast<T>(divisor);
  }
}

#define DEAR_ADD(NAME, T)                                                                \
  DEAR_MULTIARCH void NAME(T* out, const T* a, const T* b, int64_t count, int divisor) { \
    if (divisor == 1) {                                                                  \
      for (int64_t i = 0; i < count; ++i) out[i] = add_scaled<T>(a[i], b[i], 1);         \
    } else {                                                                             \
      for (int64_t i = 0; i < count; ++i) out[i] = add_scaled<T>(a[i], b[i], divisor);   \
    }                                                                                    \
  }
DEAR_ADD(add_double, double)
DEAR_ADD(add_float, float)
DEAR_ADD(add_int64, int64_t)
DEAR_ADD(add_int32, int32_t)
DEAR_ADD(add_int16, int16_t)
DEAR_ADD(add_int8, int8_t)
DEAR_ADD(add_uint8, uint8_t)
#undef DEAR_ADD

// bfloat16 by hand on the bits: the compiler vectorises this, and not the class's conversions.
inline float widen(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof(value));
  return value;
}

inline uint16_t narrow(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return value != value ? static_cast<uint16_t>(0x7fc0) : static_cast<uint16_t>(rounded);
}

DEAR_MULTIARCH void add_bfloat16(uint16_t* out, const uint16_t* a, const uint16_t* b, int64_t count,
                                 int divisor) {
  const float by = static_cast<float>(divisor);
  for (int64_t i = 0; i < count; ++i) out[i] = narrow((widen(a[i]) + widen(b[i])) / by);
}

#ifdef __FLT16_MAX__
// The compiler's own half type converts eight or sixteen at a time where the machine can.
DEAR_MULTIARCH void add_half(_Float16* out, const _Float16* a, const _Float16* b, int64_t count,
                             int divisor) {
  const float by = static_cast<float>(divisor);
  for (int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<_Float16>((static_cast<float>(a[i]) + static_cast<float>(b[i])) / by);
  }
}
using HalfBits = _Float16;
#else
void add_half(c10::Half* out, const c10::Half* a, const c10::Half* b, int64_t count, int divisor) {
  const float by = static_cast<float>(divisor);
  for (int64_t i = 0; i < count; ++i) out[i] = (static_cast<float>(a[i]) + static_cast<float>(b[i])) / by;
}
using HalfBits = c10::Half;
#endif

template <typename T, typename F>
void call(F f, void* out, const void* a, const void* b, int64_t count, int divisor) {
  f(static_cast<T*>(out), static_cast<const T*>(a), static_cast<const T*>(b), count, divisor);
}

}  // namespace

void check_summable(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
    case at::kFloat:
    case at::kHalf:
    case at::kBFloat16:
    case at::kLong:
    case at::kInt:
    case at::kShort:
    case at::kChar:
    case at::kByte:
      return;
    default:
      TORCH_CHECK(false, "The ring cannot sum tensors of dtype ", type,
                  ": cast to float64, float32, float16, bfloat16 or an integer type first.");
  }
}

void accumulate(at::ScalarType type, void* out, const void* a, const void* b, int64_t count, int divisor) {
  switch (type) {
    case at::kDouble:
      return call<double>(add_double, out, a, b, count, divisor);
    case at::kFloat:
      return call<float>(add_float, out, a, b, count, divisor);
    case at::kHalf:
      return call<HalfBits>(add_half, out, a, b, count, divisor);
    case at::kBFloat16:
      return call<uint16_t>(add_bfloat16, out, a, b, count, divisor);
    case at::kLong:
      return call<int64_t>(add_int64, out, a, b, count, divisor);
    case at::kInt:
      return call<int32_t>(add_int32, out, a, b, count, divisor);
    case at::kShort:
      return call<int16_t>(add_int16, out, a, b, count, divisor);
    case at::kChar:
      return call<int8_t>(add_int8, out, a, b, count, divisor);
    case at::kByte:
      return call<uint8_t>(add_uint8, out, a, b, count, divisor);
    default:
      check_summable(type);
  }
}

}  // namespace dear
