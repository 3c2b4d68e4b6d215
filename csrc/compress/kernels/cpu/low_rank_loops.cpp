#include "compress/kernels/cpu/low_rank_loops.h"

#include "compress/kernels/cpu/isa.h"

namespace dear::compress::cpu {

DEAR_CLONES void dot_two_rows(const float* a, const float* b, const float* across, int64_t stride, int64_t n,
                              float* sums) {
  const float* q0 = across;
  const float* q1 = across + stride;
  const float* q2 = across + 2 * stride;
  const float* q3 = across + 3 * stride;
  float a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
  DEAR_SIMD_SUM(a0, a1, a2, a3, b0, b1, b2, b3)
  for (int64_t i = 0; i < n; ++i) {
    a0 += a[i] * q0[i];
    a1 += a[i] * q1[i];
    a2 += a[i] * q2[i];
    a3 += a[i] * q3[i];
    b0 += b[i] * q0[i];
    b1 += b[i] * q1[i];
    b2 += b[i] * q2[i];
    b3 += b[i] * q3[i];
  }
  const float added[] = {a0, a1, a2, a3, b0, b1, b2, b3};
  for (int k = 0; k < 8; ++k) sums[k] += added[k];
}

DEAR_CLONES void add_four_rows(const float* const* rows, const float* down, int64_t down_stride, int64_t n,
                               float* across, int64_t across_stride) {
  const float* r0 = rows[0];
  const float* r1 = rows[1];
  const float* r2 = rows[2];
  const float* r3 = rows[3];
  for (int64_t k = 0; k < kTile; ++k) {
    const float d0 = down[k];
    const float d1 = down[down_stride + k];
    const float d2 = down[2 * down_stride + k];
    const float d3 = down[3 * down_stride + k];
    float* out = across + k * across_stride;
    for (int64_t i = 0; i < n; ++i) out[i] += (d0 * r0[i] + d1 * r1[i]) + (d2 * r2[i] + d3 * r3[i]);
  }
}

DEAR_CLONES void subtract_tile(const float* row, const float* down, const float* across, int64_t stride,
                               int64_t n, float* out) {
  const float d0 = down[0];
  const float d1 = down[1];
  const float d2 = down[2];
  const float d3 = down[3];
  const float* q0 = across;
  const float* q1 = across + stride;
  const float* q2 = across + 2 * stride;
  const float* q3 = across + 3 * stride;
  for (int64_t i = 0; i < n; ++i) {
    out[i] = row[i] - ((d0 * q0[i] + d1 * q1[i]) + (d2 * q2[i] + d3 * q3[i]));
  }
}

DEAR_CLONES uint32_t keep_finite(const float* values, float* kept, int64_t n) {
  uint32_t count = 0;
  DEAR_SIMD_SUM(count)
  for (int64_t i = 0; i < n; ++i) {
    const bool finite = is_finite(values[i]);
    count += finite ? 0u : 1u;
    kept[i] = finite ? values[i] : kept[i];
  }
  return count;
}

DEAR_CLONES uint32_t drop_beyond(float limit, int64_t n, float* values) {
  uint32_t count = 0;
  DEAR_SIMD_SUM(count)
  for (int64_t i = 0; i < n; ++i) {
    const bool kept = within(values[i], limit);
    count += kept ? 0u : 1u;
    values[i] = kept ? values[i] : 0.0f;
  }
  return count;
}

DEAR_CLONES void add_values(const float* values, int64_t n, float* total) {
  for (int64_t i = 0; i < n; ++i) total[i] += values[i];
}

}  // namespace dear::compress::cpu
