#include "compress/kernels/cpu/quantize_loops.h"

#include <algorithm>

#include "compress/kernels/cpu/scale_blocks.h"
#include "float_bits.h"
#include "isa.h"

namespace dear::compress::cpu {

namespace {

// One block that has a scale: `n` is its length, which a compiler that knows it makes whole vectors of. Two
// passes, since the scale is known after the first; the block stays in registers and in the first-level
// cache.
template <CodeType kType, bool kStochastic>
DEAR_INLINED uint32_t quantize_block(const float* __restrict values, float* __restrict error, int64_t n,
                                     uint32_t key, uint32_t index, uint8_t* __restrict codes,
                                     uint8_t* __restrict scale) {
  const Rounding rounding{kStochastic, key};
  uint32_t dropped = 0;
  int32_t largest = 0;  // the bits of magnitudes order as whole numbers do
  for (int64_t i = 0; i < n; ++i) {
    const float sum = values[i] + error[i];
    const bool kept = within(sum, kLargestQuantized);
    const float corrected = kept ? sum : error[i];
    dropped += kept ? 0u : 1u;
    largest = std::max(largest, static_cast<int32_t>(float_bits(corrected) & ~kSignBit));
    error[i] = corrected;
  }
  const uint32_t byte = scale_byte(static_cast<uint32_t>(largest), kType);
  const float unit = scale_of(byte);
  const float inverse = inverse_scale_of(byte);
  *scale = static_cast<uint8_t>(byte);
  for (int64_t i = 0; i < n; ++i) {
    const Rounded rounded = round_to<kType>(error[i] * inverse, rounding, index + static_cast<uint32_t>(i));
    codes[i] = static_cast<uint8_t>(rounded.code);
    error[i] -= rounded.value * unit;  // the product is exact, fused or not
  }
  return dropped;
}

template <CodeType kType, bool kStochastic>
DEAR_INLINED int64_t quantize(const float* values, float* error, int64_t n, uint32_t key, uint32_t index,
                              uint8_t* codes, uint8_t* scales) {
  int64_t dropped = 0;
  over_scale_blocks(n, [&](int64_t begin, int64_t length) __attribute__((always_inline)) {
    dropped += quantize_block<kType, kStochastic>(values + begin, error + begin, length, key,
                                                  index + static_cast<uint32_t>(begin), codes + begin,
                                                  scales + begin / kScaleBlock);
  });
  return dropped;
}

template <CodeType kType, bool kFirst>
DEAR_INLINED void add_block(const uint8_t* __restrict codes, float scale, int64_t n,
                            float* __restrict total) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = value_of<kType>(codes[i]) * scale;
    total[i] = (kFirst ? 0.0f : total[i]) + value;
  }
}

template <CodeType kType, bool kFirst>
DEAR_INLINED void add_blocks(const uint8_t* codes, const uint8_t* scales, float factor, int64_t n,
                             float* total) {
  over_scale_blocks(n, [&](int64_t begin, int64_t length) __attribute__((always_inline)) {
    add_block<kType, kFirst>(codes + begin, scale_of(scales[begin / kScaleBlock]) * factor, length,
                             total + begin);
  });
}

}  // namespace

DEAR_CLONES int64_t int8_nearest(const float* values, float* error, int64_t n, uint32_t key, uint32_t index,
                                 uint8_t* codes, uint8_t* scales) {
  return quantize<CodeType::kInt8, false>(values, error, n, key, index, codes, scales);
}

DEAR_CLONES int64_t int8_stochastic(const float* values, float* error, int64_t n, uint32_t key,
                                    uint32_t index, uint8_t* codes, uint8_t* scales) {
  return quantize<CodeType::kInt8, true>(values, error, n, key, index, codes, scales);
}

DEAR_CLONES int64_t float8_nearest(const float* values, float* error, int64_t n, uint32_t key, uint32_t index,
                                   uint8_t* codes, uint8_t* scales) {
  return quantize<CodeType::kFloat8, false>(values, error, n, key, index, codes, scales);
}

DEAR_CLONES int64_t float8_stochastic(const float* values, float* error, int64_t n, uint32_t key,
                                      uint32_t index, uint8_t* codes, uint8_t* scales) {
  return quantize<CodeType::kFloat8, true>(values, error, n, key, index, codes, scales);
}

DEAR_CLONES void first_int8(const uint8_t* codes, const uint8_t* scales, float factor, int64_t n,
                            float* total) {
  add_blocks<CodeType::kInt8, true>(codes, scales, factor, n, total);
}

DEAR_CLONES void next_int8(const uint8_t* codes, const uint8_t* scales, float factor, int64_t n,
                           float* total) {
  add_blocks<CodeType::kInt8, false>(codes, scales, factor, n, total);
}

DEAR_CLONES void first_float8(const uint8_t* codes, const uint8_t* scales, float factor, int64_t n,
                              float* total) {
  add_blocks<CodeType::kFloat8, true>(codes, scales, factor, n, total);
}

DEAR_CLONES void next_float8(const uint8_t* codes, const uint8_t* scales, float factor, int64_t n,
                             float* total) {
  add_blocks<CodeType::kFloat8, false>(codes, scales, factor, n, total);
}

QuantizeRun quantize_loop(CodeType code, bool stochastic) {
  if (code == CodeType::kInt8) return stochastic ? int8_stochastic : int8_nearest;
  return stochastic ? float8_stochastic : float8_nearest;
}

AddCodes add_loop(CodeType code, bool first) {
  if (code == CodeType::kInt8) return first ? first_int8 : next_int8;
  return first ? first_float8 : next_float8;
}

}  // namespace dear::compress::cpu
