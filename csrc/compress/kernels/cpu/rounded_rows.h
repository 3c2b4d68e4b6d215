// Gradients in rows of a format that has a scale for each block, encoded, averaged and decoded. A format has
//   quantize(values, divided, error, rows, place, payload)
//     rounds values + error, both of a place, and leaves in the error what that lost; returns how many
//     elements were dropped. `divided`: the values have been divided by the elements' scales,
//   add(payload, rows, place, first, factor, total)
//     adds what codes say, times a power of two; the first of them begins with a total of 0,
//   finish(begin, n, values)
//     makes the result, from element `begin` on, of what was added.
#pragma once

#include <algorithm>
#include <cstdint>

#include "compress/kernels/cpu/cast.h"
#include "compress/kernels/cpu/scaled_rows.h"
#include "compress/kernels/cpu/streamed.h"

namespace dear::compress::cpu {

// Without an error its place is taken by zeros, and what rounding lost is forgotten.
template <typename Format>
int64_t quantize_run(const Format& format, const float* values, bool divided, float* error, const Rows& rows,
                     const Place& place, int32_t* payload) {
  alignas(64) float scratch[kBlock];
  if (error == nullptr) {
    error = scratch;
    std::fill(scratch, scratch + place.length, 0.0f);
  }
  return format.quantize(values, divided, error, rows, place, payload);
}

template <typename Format>
int64_t encode_rows(const Format& format, const void* grad, GradType type, float* error, int64_t n,
                    const Rows& rows, int32_t* payload) {
  return sum_over_rows(rows, n, [&](const Place& place) {
    alignas(64) float scratch[kBlock];
    const int64_t begin = place.element(rows);
    const float* values = load_block(element(grad, type, begin), type, place.length, scratch);
    return quantize_run(format, values, false, error == nullptr ? nullptr : error + begin, rows, place,
                        payload);
  });
}

template <typename Format>
int64_t average_rows(const Format& format, const int32_t* payloads, const Rows& ranks, float* error,
                     int64_t n, int32_t* out) {
  const float factor = average_scale(ranks.count);
  const float divisor = static_cast<float>(ranks.count) * factor;  // 1 where there are 2, 4, 8, ... ranks
  const Rows merged{1, 0, ranks.shard};
  return sum_over_rows(merged, n, [&](const Place& place) {
    alignas(64) float mean[kBlock];
    for (int64_t rank = 0; rank < ranks.count; ++rank) {
      format.add(payloads, ranks, Place{rank, place.offset, place.length}, rank == 0, factor, mean);
    }
    if (divisor != 1) divide_values(mean, place.length, divisor);
    return quantize_run(format, mean, true, error == nullptr ? nullptr : error + place.offset, merged, place,
                        out);
  });
}

template <typename Format>
void decode_rows(const Format& format, const int32_t* payload, const Rows& rows, int64_t n, GradType type,
                 void* out) {
  const DecodedResult result(out, type, n);
  sum_over_rows(rows, n, [&](const Place& place) {
    alignas(64) float scratch[kBlock];
    const int64_t begin = place.element(rows);
    float* values = result.values(begin, scratch);
    format.add(payload, rows, place, true, 1.0f, values);
    format.finish(begin, place.length, values);
    result.store(begin, place.length, values);
    return int64_t{0};
  });
}

}  // namespace dear::compress::cpu
