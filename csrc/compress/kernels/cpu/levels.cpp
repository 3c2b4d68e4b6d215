#include "compress/kernels/cpu/levels.h"

#include <algorithm>

#include "compress/kernels/cpu/cast.h"
#include "compress/kernels/cpu/levels_loops.h"
#include "compress/kernels/cpu/quantize_loops.h"
#include "compress/kernels/cpu/scaled_rows.h"

namespace dear::compress::cpu {

namespace {

const uint32_t* fields_of(const int32_t* payload, const Rows& rows, const Place& place, int bits) {
  return reinterpret_cast<const uint32_t*>(payload + place.row * rows.stride) + place.offset * bits / 32;
}
const uint16_t* steps_of(const int32_t* payload, const Rows& rows, const Place& place, int bits) {
  const int32_t* behind = payload + place.row * rows.stride + rows.shard * bits / 32;
  return reinterpret_cast<const uint16_t*>(behind) + place.offset / kScaleBlock;
}

// values [n] plus the error, where there is one, is rounded; the error becomes what that lost.
int64_t quantize_run(const float* values, float* error, const Rows& rows, const Place& place, int bits,
                     int32_t* payload) {
  alignas(64) float scratch[kBlock];
  if (error == nullptr) {
    error = scratch;
    std::fill(scratch, scratch + place.length, 0.0f);
  }
  return levels_loops(bits).quantize(values, error, place.length,
                                     const_cast<uint32_t*>(fields_of(payload, rows, place, bits)),
                                     const_cast<uint16_t*>(steps_of(payload, rows, place, bits)));
}

}  // namespace

int64_t levels_encode(const void* grad, GradType type, float* error, int64_t n, const Rows& rows, int bits,
                      int32_t* payload) {
  return sum_over_rows(rows, n, [&](const Place& place) {
    alignas(64) float scratch[kBlock];
    const int64_t begin = place.element(rows);
    const float* values = load_block(element(grad, type, begin), type, place.length, scratch);
    return quantize_run(values, error == nullptr ? nullptr : error + begin, rows, place, bits, payload);
  });
}

int64_t levels_average(const int32_t* payloads, const Rows& ranks, float* error, int64_t n, int bits,
                       int32_t* out) {
  const float factor = average_scale(ranks.count);
  const float divisor = static_cast<float>(ranks.count) * factor;  // 1 where there are 2, 4, 8, ... ranks
  const LevelsLoops& loops = levels_loops(bits);
  const Rows merged{1, 0, ranks.shard};
  return sum_over_rows(merged, n, [&](const Place& place) {
    alignas(64) float mean[kBlock];
    for (int64_t rank = 0; rank < ranks.count; ++rank) {
      const Place from{rank, place.offset, place.length};
      (rank == 0 ? loops.first : loops.next)(fields_of(payloads, ranks, from, bits),
                                             steps_of(payloads, ranks, from, bits), factor, place.length,
                                             mean);
    }
    if (divisor != 1) divide_run(divisor, place.length, mean);
    return quantize_run(mean, error == nullptr ? nullptr : error + place.offset, merged, place, bits, out);
  });
}

void levels_decode(const int32_t* payload, const Rows& rows, int64_t n, int bits, GradType type, void* out) {
  sum_over_rows(rows, n, [&](const Place& place) {
    alignas(64) float scratch[kBlock];
    void* target = element(out, type, place.element(rows));
    float* values = type == GradType::kFloat32 ? static_cast<float*>(target) : scratch;
    levels_loops(bits).first(fields_of(payload, rows, place, bits), steps_of(payload, rows, place, bits),
                             1.0f, place.length, values);
    if (type != GradType::kFloat32) store_within_range(scratch, type, place.length, target);
    return int64_t{0};
  });
}

}  // namespace dear::compress::cpu
