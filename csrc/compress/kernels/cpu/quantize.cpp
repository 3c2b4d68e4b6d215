#include "compress/kernels/cpu/quantize.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "compress/kernels/cpu/cast.h"
#include "compress/kernels/cpu/error_feedback.h"
#include "compress/kernels/cpu/isa.h"

namespace dear::compress::cpu {

namespace {

constexpr int64_t kGrainBlocks = 8;

// Templates are inlined into functions that are compiled once per instruction set, which templates cannot be.
#define DEAR_INLINED __attribute__((always_inline)) inline

// The bits of the largest magnitude of finite values, which order as whole numbers do.
DEAR_INLINED uint32_t largest_bits(const float* values, int64_t n) {
  int32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, static_cast<int32_t>(float_bits(values[i]) & ~kSignBit));
  }
  return static_cast<uint32_t>(largest);
}

// `values` become codes and scales, and what that lost.
template <CodeType kType, bool kStochastic>
DEAR_INLINED void quantize(float* values, int64_t n, uint32_t key, uint32_t index, uint8_t* codes,
                           uint8_t* scales) {
  const Rounding rounding{kStochastic, key};
  for (int64_t begin = 0; begin < n; begin += kScaleBlock) {
    float* own = values + begin;
    const int64_t length = std::min(kScaleBlock, n - begin);
    const uint32_t byte = scale_byte(largest_bits(own, length), kType);
    const float scale = scale_of(byte);
    const float inverse = inverse_scale_of(byte);
    scales[begin / kScaleBlock] = static_cast<uint8_t>(byte);
    for (int64_t i = 0; i < length; ++i) {
      const uint32_t code =
          code_of<kType>(own[i] * inverse, rounding, index + static_cast<uint32_t>(begin + i));
      codes[begin + i] = static_cast<uint8_t>(code);
      own[i] -= value_of<kType>(code) * scale;  // the product is exact, fused or not
    }
  }
}

// total += factor, a power of two, times what the codes say.
template <CodeType kType>
DEAR_INLINED void add_codes(const uint8_t* codes, const uint8_t* scales, float factor, int64_t n,
                            float* total) {
  for (int64_t begin = 0; begin < n; begin += kScaleBlock) {
    const int64_t length = std::min(kScaleBlock, n - begin);
    const float scale = scale_of(scales[begin / kScaleBlock]) * factor;
    for (int64_t i = 0; i < length; ++i) total[begin + i] += value_of<kType>(codes[begin + i]) * scale;
  }
}

}  // namespace

DEAR_CLONES void int8_nearest(float* values, int64_t n, uint32_t key, uint32_t index, uint8_t* codes,
                              uint8_t* scales) {
  quantize<CodeType::kInt8, false>(values, n, key, index, codes, scales);
}

DEAR_CLONES void int8_stochastic(float* values, int64_t n, uint32_t key, uint32_t index, uint8_t* codes,
                                 uint8_t* scales) {
  quantize<CodeType::kInt8, true>(values, n, key, index, codes, scales);
}

DEAR_CLONES void float8_nearest(float* values, int64_t n, uint32_t key, uint32_t index, uint8_t* codes,
                                uint8_t* scales) {
  quantize<CodeType::kFloat8, false>(values, n, key, index, codes, scales);
}

DEAR_CLONES void float8_stochastic(float* values, int64_t n, uint32_t key, uint32_t index, uint8_t* codes,
                                   uint8_t* scales) {
  quantize<CodeType::kFloat8, true>(values, n, key, index, codes, scales);
}

DEAR_CLONES void add_int8(const uint8_t* codes, const uint8_t* scales, float factor, int64_t n,
                          float* total) {
  add_codes<CodeType::kInt8>(codes, scales, factor, n, total);
}

DEAR_CLONES void add_float8(const uint8_t* codes, const uint8_t* scales, float factor, int64_t n,
                            float* total) {
  add_codes<CodeType::kFloat8>(codes, scales, factor, n, total);
}

DEAR_CLONES void divide_mean(float divisor, int64_t n, float* values) {
  for (int64_t i = 0; i < n; ++i) values[i] /= divisor;
}

namespace {

// A block of elements of one owner's row.
struct Place {
  int64_t row;
  int64_t offset;  // in the shard
  int64_t length;

  int64_t element(const Rows& rows) const { return row * rows.shard + offset; }
  const uint8_t* codes(const int32_t* payload, const Rows& rows) const {
    return reinterpret_cast<const uint8_t*>(payload + row * rows.stride) + offset;
  }
  const uint8_t* scales(const int32_t* payload, const Rows& rows) const {
    return reinterpret_cast<const uint8_t*>(payload + row * rows.stride) + rows.shard + offset / kScaleBlock;
  }
};

// Calls visit(place) for the blocks of all rows, of which n elements exist; adds up what it returns.
template <typename Visit>
int64_t sum_over_rows(const Rows& rows, int64_t n, const Visit& visit) {
  const int64_t blocks = block_count(rows.shard);
  std::atomic<int64_t> total{0};
  at::parallel_for(0, rows.count * blocks, kGrainBlocks, [&](int64_t first, int64_t last) {
    int64_t count = 0;
    for (int64_t block = first; block < last; ++block) {
      Place place{block / blocks, block % blocks * kBlock, 0};
      const int64_t in_shard = rows.shard - place.offset;
      place.length = std::min(std::min(kBlock, in_shard), n - place.element(rows));
      if (place.length > 0) count += visit(place);
    }
    total.fetch_add(count, std::memory_order_relaxed);
  });
  return total.load();
}

// values [n] plus the error, where there is one, is rounded; the error becomes what that lost.
int64_t quantize_block(const float* values, float* error, int64_t n, CodeType code, Rounding rounding,
                       uint32_t index, uint8_t* codes, uint8_t* scales) {
  alignas(64) float scratch[kBlock];
  float* corrected = error;
  if (error == nullptr) {
    corrected = scratch;
    std::fill(scratch, scratch + n, 0.0f);
  }
  const int64_t dropped = correct_values(values, corrected, n, kLargestQuantized);
  const auto round = code == CodeType::kInt8 ? (rounding.stochastic ? int8_stochastic : int8_nearest)
                                             : (rounding.stochastic ? float8_stochastic : float8_nearest);
  round(corrected, n, rounding.key, index, codes, scales);
  return dropped;
}

}  // namespace

int64_t quantize_encode(const void* grad, GradType type, float* error, int64_t n, const Rows& rows,
                        CodeType code, Rounding rounding, int32_t* payload) {
  return sum_over_rows(rows, n, [&](const Place& place) {
    alignas(64) float scratch[kBlock];
    const int64_t begin = place.element(rows);
    const float* values = load_block(element(grad, type, begin), type, place.length, scratch);
    return quantize_block(values, error == nullptr ? nullptr : error + begin, place.length, code, rounding,
                          static_cast<uint32_t>(begin), const_cast<uint8_t*>(place.codes(payload, rows)),
                          const_cast<uint8_t*>(place.scales(payload, rows)));
  });
}

int64_t quantize_average(const int32_t* payloads, const Rows& ranks, float* error, int64_t n, CodeType code,
                         Rounding rounding, int32_t* out) {
  const float factor = average_scale(ranks.count);
  const Rows merged{1, 0, ranks.shard};
  return sum_over_rows(merged, n, [&](Place place) {
    alignas(64) float mean[kBlock];
    std::fill(mean, mean + place.length, 0.0f);
    const auto add = code == CodeType::kInt8 ? add_int8 : add_float8;
    for (int64_t rank = 0; rank < ranks.count; ++rank) {
      const Place from{rank, place.offset, place.length};
      add(from.codes(payloads, ranks), from.scales(payloads, ranks), factor, place.length, mean);
    }
    divide_mean(static_cast<float>(ranks.count) * factor, place.length, mean);
    return quantize_block(mean, error == nullptr ? nullptr : error + place.offset, place.length, code,
                          rounding, static_cast<uint32_t>(place.offset),
                          const_cast<uint8_t*>(place.codes(out, merged)),
                          const_cast<uint8_t*>(place.scales(out, merged)));
  });
}

void quantize_decode(const int32_t* payload, const Rows& rows, int64_t n, CodeType code, GradType type,
                     void* out) {
  sum_over_rows(rows, n, [&](const Place& place) {
    alignas(64) float scratch[kBlock];
    void* target = element(out, type, place.element(rows));
    float* values = type == GradType::kFloat32 ? static_cast<float*>(target) : scratch;
    std::fill(values, values + place.length, 0.0f);
    const auto add = code == CodeType::kInt8 ? add_int8 : add_float8;
    add(place.codes(payload, rows), place.scales(payload, rows), 1.0f, place.length, values);
    if (type != GradType::kFloat32) store_within_range(scratch, type, place.length, target);
    return int64_t{0};
  });
}

}  // namespace dear::compress::cpu
