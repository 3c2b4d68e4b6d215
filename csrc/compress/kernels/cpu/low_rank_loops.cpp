#include "compress/kernels/cpu/low_rank_loops.h"

#include <algorithm>

#include "compress/kernels/cpu/low_rank.h"
#include "compress/kernels/cpu/tile.h"
#include "float_bits.h"
#include "isa.h"

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
  const Tile tile(down, across, stride);
  for (int64_t i = 0; i < n; ++i) out[i] = row[i] - tile.product(i);
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

namespace {

// `in_place`: `base` is `kept`, which a compiler that looks for overlaps cannot know.
__attribute__((always_inline)) inline uint32_t subtract_and_add_from(const float* base, bool in_place,
                                                                     const float* down, const float* across,
                                                                     int64_t stride, const float* grad,
                                                                     float limit, int64_t n, float* kept) {
  const Tile tile(down, across, stride);
  uint32_t count = 0;
  DEAR_SIMD_SUM(count)
  for (int64_t i = 0; i < n; ++i) {
    const float from = in_place ? kept[i] : base[i];
    const float rest = from - tile.product(i);
    const bool finite = is_finite(rest);
    const float error = finite ? rest : kept[i];
    const float sum = grad[i] + error;
    const bool stays = within(sum, limit);
    count += (finite ? 0u : 1u) + (stays ? 0u : 1u);
    kept[i] = stays ? sum : error;
  }
  return count;
}

// One element of C: see subtract_and_add.
__attribute__((always_inline)) inline float corrected(float kept, float product, float grad, float limit,
                                                      uint32_t& count) {
  const float rest = kept - product;
  const bool finite = is_finite(rest);
  const float error = finite ? rest : kept;
  const float sum = grad + error;
  const bool stays = within(sum, limit);
  count += (finite ? 0u : 1u) + (stays ? 0u : 1u);
  return stays ? sum : error;
}

}  // namespace

DEAR_CLONES uint32_t subtract_and_add(const float* down, const float* across, int64_t stride,
                                      const float* grad, float limit, int64_t n, float* kept) {
  return subtract_and_add_from(kept, true, down, across, stride, grad, limit, n, kept);
}

DEAR_CLONES uint32_t subtract_last_and_add(const float* base, const float* down, const float* across,
                                           int64_t stride, const float* grad, float limit, int64_t n,
                                           float* kept) {
  return subtract_and_add_from(base, false, down, across, stride, grad, limit, n, kept);
}

// The loop of two rows is two functions, for a GCC that cannot clone an overloaded one.
DEAR_CLONES uint32_t project_two(const Together<2>& rows, const float* across, int64_t stride, float limit,
                                 int64_t n, float* sums) {
  float* kept_a = rows.kept[0];
  float* kept_b = rows.kept[1];
  const float* grad_a = rows.grad[0];
  const float* grad_b = rows.grad[1];
  const float* p = rows.pending_across;
  const float pa0 = rows.pending[0][0], pa1 = rows.pending[0][1], pa2 = rows.pending[0][2],
              pa3 = rows.pending[0][3];
  const float pb0 = rows.pending[1][0], pb1 = rows.pending[1][1], pb2 = rows.pending[1][2],
              pb3 = rows.pending[1][3];
  float a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
  uint32_t count = 0;
  DEAR_SIMD_SUM(a0, a1, a2, a3, b0, b1, b2, b3, count)
  for (int64_t i = 0; i < n; ++i) {
    const float p0 = p[i], p1 = p[i + stride], p2 = p[i + 2 * stride], p3 = p[i + 3 * stride];
    const float q0 = across[i], q1 = across[i + stride], q2 = across[i + 2 * stride],
                q3 = across[i + 3 * stride];
    const float a =
        corrected(kept_a[i], (pa0 * p0 + pa1 * p1) + (pa2 * p2 + pa3 * p3), grad_a[i], limit, count);
    const float b =
        corrected(kept_b[i], (pb0 * p0 + pb1 * p1) + (pb2 * p2 + pb3 * p3), grad_b[i], limit, count);
    kept_a[i] = a;
    kept_b[i] = b;
    a0 += a * q0;
    a1 += a * q1;
    a2 += a * q2;
    a3 += a * q3;
    b0 += b * q0;
    b1 += b * q1;
    b2 += b * q2;
    b3 += b * q3;
  }
  const float added[] = {a0, a1, a2, a3, b0, b1, b2, b3};
  for (int k = 0; k < 8; ++k) sums[k] += added[k];
  return count;
}

DEAR_CLONES uint32_t project_four(const Together<4>& rows, const float* down, float* across, int64_t stride,
                                  float limit, int64_t n) {
  float* kept_0 = rows.kept[0];
  float* kept_1 = rows.kept[1];
  float* kept_2 = rows.kept[2];
  float* kept_3 = rows.kept[3];
  const float* grad_0 = rows.grad[0];
  const float* grad_1 = rows.grad[1];
  const float* grad_2 = rows.grad[2];
  const float* grad_3 = rows.grad[3];
  const float* p = rows.pending_across;
  float pending[4][kTile];
  float d[4][kTile];
  for (int r = 0; r < 4; ++r) {
    for (int64_t k = 0; k < kTile; ++k) {
      pending[r][k] = rows.pending[r][k];
      d[r][k] = down[r * kTile + k];
    }
  }
  uint32_t count = 0;
  DEAR_SIMD_SUM(count)
  for (int64_t i = 0; i < n; ++i) {
    const float p0 = p[i], p1 = p[i + stride], p2 = p[i + 2 * stride], p3 = p[i + 3 * stride];
    const float c0 = corrected(
        kept_0[i], (pending[0][0] * p0 + pending[0][1] * p1) + (pending[0][2] * p2 + pending[0][3] * p3),
        grad_0[i], limit, count);
    const float c1 = corrected(
        kept_1[i], (pending[1][0] * p0 + pending[1][1] * p1) + (pending[1][2] * p2 + pending[1][3] * p3),
        grad_1[i], limit, count);
    const float c2 = corrected(
        kept_2[i], (pending[2][0] * p0 + pending[2][1] * p1) + (pending[2][2] * p2 + pending[2][3] * p3),
        grad_2[i], limit, count);
    const float c3 = corrected(
        kept_3[i], (pending[3][0] * p0 + pending[3][1] * p1) + (pending[3][2] * p2 + pending[3][3] * p3),
        grad_3[i], limit, count);
    kept_0[i] = c0;
    kept_1[i] = c1;
    kept_2[i] = c2;
    kept_3[i] = c3;
    across[i] += (d[0][0] * c0 + d[1][0] * c1) + (d[2][0] * c2 + d[3][0] * c3);
    across[i + stride] += (d[0][1] * c0 + d[1][1] * c1) + (d[2][1] * c2 + d[3][1] * c3);
    across[i + 2 * stride] += (d[0][2] * c0 + d[1][2] * c1) + (d[2][2] * c2 + d[3][2] * c3);
    across[i + 3 * stride] += (d[0][3] * c0 + d[1][3] * c1) + (d[2][3] * c2 + d[3][3] * c3);
  }
  return count;
}

uint32_t project_together(const Together<2>& rows, const float* across, int64_t stride, float limit,
                          int64_t n, float* sums) {
  return project_two(rows, across, stride, limit, n, sums);
}

uint32_t project_together(const Together<4>& rows, const float* down, float* across, int64_t stride,
                          float limit, int64_t n) {
  return project_four(rows, down, across, stride, limit, n);
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

void lay_across(const float* factor, int64_t length, int64_t rank, float* across) {
  std::fill(across + rank * length, across + padded_rank(rank) * length, 0.0f);
  for (int64_t i = 0; i < length; ++i) {
    for (int64_t k = 0; k < rank; ++k) across[k * length + i] = factor[i * rank + k];
  }
}

}  // namespace dear::compress::cpu
