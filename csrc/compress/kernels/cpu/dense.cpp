#include "compress/kernels/cpu/dense.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "compress/kernels/cpu/cast.h"
#include "compress/kernels/cpu/error_feedback.h"
#include "compress/kernels/cpu/scaled_rows.h"
#include "compress/kernels/cpu/streamed.h"
#include "float_bits.h"
#include "isa.h"

namespace dear::compress::cpu {

DEAR_CLONES void subtract_values(const float* values, int64_t n, float* total) {
  for (int64_t i = 0; i < n; ++i) total[i] -= values[i];
}

// `scale` is a power of two: the product is exact, fused or not.
DEAR_CLONES void add_payload(const float* values, float scale, int64_t n, float* total) {
  for (int64_t i = 0; i < n; ++i) total[i] += scale * values[i];
}

// The same for bfloat16, which is widened on the way; the first payload begins with a total of 0.
DEAR_CLONES void add_bfloat16(const uint16_t* values, float scale, int64_t n, float* total) {
  for (int64_t i = 0; i < n; ++i) total[i] += scale * bfloat16_value(values[i]);
}

DEAR_CLONES void first_bfloat16(const uint16_t* values, float scale, int64_t n, float* total) {
  for (int64_t i = 0; i < n; ++i) total[i] = 0.0f + scale * bfloat16_value(values[i]);
}

// How many 16-bit floats have all bits of the exponent set.
DEAR_CLONES uint32_t count_nonfinite(const uint16_t* values, int64_t n, uint16_t exponent) {
  uint32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += (values[i] & exponent) == exponent;
  return count;
}

namespace {

constexpr uint16_t kHalfExponent = 0x7c00;
constexpr uint16_t kBFloat16Exponent = 0x7f80;
constexpr int64_t kGrainBlocks = 8;

// One block of either operation.
int64_t round_block(const float* values, float* error, int64_t n, GradType type, void* out) {
  if (error == nullptr) {
    store_block(values, type, n, out);
    return count_nonfinite(static_cast<const uint16_t*>(out), n,
                           type == GradType::kFloat16 ? kHalfExponent : kBFloat16Exponent);
  }
  float scratch[kBlock];
  const int64_t dropped = correct_values(values, error, n);
  clamp_values(error, n, largest(type), scratch);
  store_block(scratch, type, n, out);
  subtract_values(load_block(out, type, n, scratch), n, error);
  return dropped;
}

// Calls visit(offset, length) for all blocks; adds up what it returns.
template <typename Visit>
int64_t sum_over_blocks(int64_t n, const Visit& visit) {
  std::atomic<int64_t> total{0};
  at::parallel_for(0, block_count(n), kGrainBlocks, [&](int64_t first, int64_t last) {
    int64_t count = 0;
    for (int64_t block = first; block < last; ++block) {
      count += visit(block * kBlock, std::min(kBlock, n - block * kBlock));
    }
    total.fetch_add(count, std::memory_order_relaxed);
  });
  return total.load();
}

}  // namespace

int64_t dense_round(const void* grad, GradType type, float* error, int64_t n, GradType out_type, void* out) {
  return sum_over_blocks(n, [&](int64_t offset, int64_t length) {
    float scratch[kBlock];
    const float* values = load_block(element(grad, type, offset), type, length, scratch);
    return round_block(values, error == nullptr ? nullptr : error + offset, length, out_type,
                       element(out, out_type, offset));
  });
}

int64_t dense_average(const void* payloads, GradType type, int64_t ranks, int64_t stride, float* error,
                      int64_t n, void* out) {
  const float scale = average_scale(ranks);
  const float divisor = static_cast<float>(ranks) * scale;  // 1 where there are 2, 4, 8, ... ranks
  return sum_over_blocks(n, [&](int64_t offset, int64_t length) {
    alignas(64) float scratch[kBlock];
    alignas(64) float mean[kBlock];
    if (type != GradType::kBFloat16) std::fill(mean, mean + length, 0.0f);
    for (int64_t rank = 0; rank < ranks; ++rank) {
      const void* payload = element(payloads, type, rank * stride + offset);
      if (type == GradType::kBFloat16) {
        (rank == 0 ? first_bfloat16 : add_bfloat16)(static_cast<const uint16_t*>(payload), scale, length,
                                                    mean);
      } else {
        add_payload(load_block(payload, type, length, scratch), scale, length, mean);
      }
    }
    if (divisor != 1) divide_values(mean, length, divisor);
    return round_block(mean, error == nullptr ? nullptr : error + offset, length, type,
                       element(out, type, offset));
  });
}

void dense_decode(const void* payload, GradType type, const Rows& rows, int64_t n, float* out) {
  const DecodedResult result(out, GradType::kFloat32, n);
  sum_over_rows(rows, n, [&](const Place& place) {
    alignas(64) float scratch[kBlock];
    const int64_t begin = place.element(rows);
    float* values = result.values(begin, scratch);
    load_block(element(payload, type, place.row * rows.stride + place.offset), type, place.length, values);
    result.store(begin, place.length, values);
    return int64_t{0};
  });
}

}  // namespace dear::compress::cpu
