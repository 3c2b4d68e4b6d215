#include "collectives/accumulate.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>

#include "float_bits.h"
#include "isa.h"

namespace dear {
namespace {

bool is_sum(const AddRule& rule) {
  return rule.own_scale == 1 && rule.received_scale == 1 && rule.divisor == 1;
}

// The three shapes of a rule: a sum, a scaled sum, a scaled sum that is divided. COMPUTE(x) is the value of
// type F in which x is computed with, SCALED(x, s) that of x times s, STORE(y) what is stored of it.
#define DEAR_COMBINE(F, COMPUTE, SCALED, STORE)                                                     \
  const F so = static_cast<F>(rule.own_scale);                                                      \
  const F sr = static_cast<F>(rule.received_scale);                                                 \
  const F by = static_cast<F>(rule.divisor);                                                        \
  if (is_sum(rule)) {                                                                               \
    for (int64_t i = 0; i < count; ++i) out[i] = STORE(COMPUTE(a[i]) + COMPUTE(b[i]));              \
  } else if (by == 1) {                                                                             \
    for (int64_t i = 0; i < count; ++i) out[i] = STORE(SCALED(a[i], sr) + SCALED(b[i], so));        \
  } else {                                                                                          \
    for (int64_t i = 0; i < count; ++i) out[i] = STORE((SCALED(a[i], sr) + SCALED(b[i], so)) / by); \
  }

#define DEAR_TIMES(x, s) ((x) * (s))
#define DEAR_ADD_FLOATING(NAME, T)                                                            \
  DEAR_CLONES void NAME(T* out, const T* a, const T* b, int64_t count, const AddRule& rule) { \
    DEAR_COMBINE(T, static_cast<T>, DEAR_TIMES, static_cast<T>)                               \
  }
DEAR_ADD_FLOATING(add_double, double)
DEAR_ADD_FLOATING(add_float, float)
#undef DEAR_ADD_FLOATING
#undef DEAR_TIMES

template <typename T>
inline T add_wrapping(T a, T b) {
  using U = std::make_unsigned_t<T>;
  return static_cast<T>(static_cast<U>(a) + static_cast<U>(b));
}

#define DEAR_ADD(NAME, T)                                                                     \
  DEAR_CLONES void NAME(T* out, const T* a, const T* b, int64_t count, const AddRule& rule) { \
    const auto by = static_cast<int>(rule.divisor);                                           \
    if (by == 1) {                                                                            \
      for (int64_t i = 0; i < count; ++i) out[i] = add_wrapping<T>(a[i], b[i]);               \
    } else {                                                                                  \
      for (int64_t i = 0; i < count; ++i)                                                     \
        out[i] = static_cast<T>(add_wrapping<T>(a[i], b[i]) / static_cast<T>(by));            \
    }                                                                                         \
  }
DEAR_ADD(add_int64, int64_t)
DEAR_ADD(add_int32, int32_t)
DEAR_ADD(add_int16, int16_t)
DEAR_ADD(add_int8, int8_t)
DEAR_ADD(add_uint8, uint8_t)
#undef DEAR_ADD

#define DEAR_TIMES(x, s) (bfloat16_value(x) * (s))
DEAR_CLONES void add_bfloat16(uint16_t* out, const uint16_t* a, const uint16_t* b, int64_t count,
                              const AddRule& rule) {
  DEAR_COMBINE(float, bfloat16_value, DEAR_TIMES, bfloat16_bits)
}
#undef DEAR_TIMES

#ifdef __FLT16_MAX__
// The compiler's own half type converts eight or sixteen at a time where the machine can.
using HalfBits = _Float16;
#else
using HalfBits = c10::Half;
#endif

// Its subnormal numbers are as large as gradients are, and torch's DDP rounds what it divides.
#define DEAR_TIMES(x, s) static_cast<float>(static_cast<HalfBits>(static_cast<float>(x) * (s)))
DEAR_CLONES void add_half(HalfBits* out, const HalfBits* a, const HalfBits* b, int64_t count,
                          const AddRule& rule) {
  DEAR_COMBINE(float, static_cast<float>, DEAR_TIMES, static_cast<HalfBits>)
}
#undef DEAR_TIMES
#undef DEAR_COMBINE

template <typename T, typename F>
void call(F f, void* out, const void* a, const void* b, int64_t count, const AddRule& rule) {
  f(static_cast<T*>(out), static_cast<const T*>(a), static_cast<const T*>(b), count, rule);
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

AddRule average_rule(at::ScalarType type, int world, bool first, bool last) {
  AddRule rule;
  if (at::isIntegralType(type, false)) {
    if (last) rule.divisor = static_cast<float>(world);
    return rule;
  }
  while (rule.own_scale * static_cast<float>(world) > 1) rule.own_scale /= 2;
  if (first) rule.received_scale = rule.own_scale;
  if (last) rule.divisor = rule.own_scale * static_cast<float>(world);
  return rule;
}

void accumulate(at::ScalarType type, void* out, const void* a, const void* b, int64_t count,
                const AddRule& rule) {
  switch (type) {
    case at::kDouble:
      return call<double>(add_double, out, a, b, count, rule);
    case at::kFloat:
      return call<float>(add_float, out, a, b, count, rule);
    case at::kHalf:
      return call<HalfBits>(add_half, out, a, b, count, rule);
    case at::kBFloat16:
      return call<uint16_t>(add_bfloat16, out, a, b, count, rule);
    case at::kLong:
      return call<int64_t>(add_int64, out, a, b, count, rule);
    case at::kInt:
      return call<int32_t>(add_int32, out, a, b, count, rule);
    case at::kShort:
      return call<int16_t>(add_int16, out, a, b, count, rule);
    case at::kChar:
      return call<int8_t>(add_int8, out, a, b, count, rule);
    case at::kByte:
      return call<uint8_t>(add_uint8, out, a, b, count, rule);
    default:
      check_summable(type);
  }
}

}  // namespace dear
