#include "compress/kernels/cpu/quantize.h"

#include <algorithm>

#include "compress/kernels/cpu/cast.h"
#include "compress/kernels/cpu/quantize_loops.h"
#include "compress/kernels/cpu/scaled_rows.h"

namespace dear::compress::cpu {

namespace {

const uint8_t* codes_of(const int32_t* payload, const Rows& rows, const Place& place) {
  return reinterpret_cast<const uint8_t*>(payload + place.row * rows.stride) + place.offset;
}
const uint8_t* scales_of(const int32_t* payload, const Rows& rows, const Place& place) {
  return reinterpret_cast<const uint8_t*>(payload + place.row * rows.stride) + rows.shard +
         place.offset / kScaleBlock;
}

// values [n] plus the error, where there is one, is rounded; the error becomes what that lost.
int64_t quantize_run(const float* values, float* error, int64_t n, CodeType code, Rounding rounding,
                     uint32_t index, uint8_t* codes, uint8_t* scales) {
  alignas(64) float scratch[kBlock];
  if (error == nullptr) {
    error = scratch;
    std::fill(scratch, scratch + n, 0.0f);
  }
  return quantize_loop(code, rounding.stochastic)(values, error, n, rounding.key, index, codes, scales);
}

}  // namespace

int64_t quantize_encode(const void* grad, GradType type, float* error, int64_t n, const Rows& rows,
                        CodeType code, Rounding rounding, int32_t* payload) {
  return sum_over_rows(rows, n, [&](const Place& place) {
    alignas(64) float scratch[kBlock];
    const int64_t begin = place.element(rows);
    const float* values = load_block(element(grad, type, begin), type, place.length, scratch);
    return quantize_run(values, error == nullptr ? nullptr : error + begin, place.length, code, rounding,
                        static_cast<uint32_t>(begin), const_cast<uint8_t*>(codes_of(payload, rows, place)),
                        const_cast<uint8_t*>(scales_of(payload, rows, place)));
  });
}

int64_t quantize_average(const int32_t* payloads, const Rows& ranks, float* error, int64_t n, CodeType code,
                         Rounding rounding, int32_t* out) {
  const float factor = average_scale(ranks.count);
  const float divisor = static_cast<float>(ranks.count) * factor;  // 1 where there are 2, 4, 8, ... ranks
  const Rows merged{1, 0, ranks.shard};
  return sum_over_rows(merged, n, [&](Place place) {
    alignas(64) float mean[kBlock];
    for (int64_t rank = 0; rank < ranks.count; ++rank) {
      const Place from{rank, place.offset, place.length};
      add_loop(code, rank == 0)(codes_of(payloads, ranks, from), scales_of(payloads, ranks, from), factor,
                                place.length, mean);
    }
    if (divisor != 1) divide_run(divisor, place.length, mean);
    return quantize_run(mean, error == nullptr ? nullptr : error + place.offset, place.length, code, rounding,
                        static_cast<uint32_t>(place.offset),
                        const_cast<uint8_t*>(codes_of(out, merged, place)),
                        const_cast<uint8_t*>(scales_of(out, merged, place)));
  });
}

void quantize_decode(const int32_t* payload, const Rows& rows, int64_t n, CodeType code, GradType type,
                     void* out) {
  sum_over_rows(rows, n, [&](const Place& place) {
    alignas(64) float scratch[kBlock];
    void* target = element(out, type, place.element(rows));
    float* values = type == GradType::kFloat32 ? static_cast<float*>(target) : scratch;
    add_loop(code, true)(codes_of(payload, rows, place), scales_of(payload, rows, place), 1.0f, place.length,
                         values);
    if (type != GradType::kFloat32) store_within_range(scratch, type, place.length, target);
    return int64_t{0};
  });
}

}  // namespace dear::compress::cpu
