// The loops of the low-rank kernels along the rows of matrices. The rank is worked on in tiles of four.
#pragma once

#include <cstdint>

#include "compress/kernels/cpu/tile.h"

namespace dear::compress::cpu {

// sums[k] += a . across[k], sums[4 + k] += b . across[k]
void dot_two_rows(const float* a, const float* b, const float* across, int64_t stride, int64_t n,
                  float* sums);

// across[k] += sum over four rows i of down[i][k] * rows[i], for k of one tile.
void add_four_rows(const float* const* rows, const float* down, int64_t down_stride, int64_t n, float* across,
                   int64_t across_stride);

// out = row - sum over k of one tile of down[k] * across[k]; `out` may be `row`.
void subtract_tile(const float* row, const float* down, const float* across, int64_t stride, int64_t n,
                   float* out);

// kept = values where those are finite; returns how many are not.
uint32_t keep_finite(const float* values, float* kept, int64_t n);

// One pass for: kept -= what subtract_tile subtracts, where that is finite; then kept += grad, where the sum
// is within the limit. Returns in how many places it is not so.
uint32_t subtract_and_add(const float* down, const float* across, int64_t stride, const float* grad,
                          float limit, int64_t n, float* kept);

// The same where other tiles were subtracted before, into `base`, which does not overlap `kept`.
uint32_t subtract_last_and_add(const float* base, const float* down, const float* across, int64_t stride,
                               const float* grad, float limit, int64_t n, float* kept);

// Rows of a matrix that are corrected and projected in one pass, everything in registers: kept[r] becomes
// C = (kept[r] - pending[r] . pending_across) + grad[r], as subtract_and_add says. Where a row does not
// exist, zeros stand in its place. All pointers but those of one row are to different memory.
template <int64_t kRows>
struct Together {
  float* kept[kRows];
  const float* grad[kRows];
  float pending[kRows][kTile];  // of P, in the last step's factors
  const float* pending_across;
};

// As subtract_and_add for two rows; and sums[4 r + k] += C[r] . across[k].
uint32_t project_together(const Together<2>& rows, const float* across, int64_t stride, float limit,
                          int64_t n, float* sums);

// As subtract_and_add for four rows; and across[k] += sum over r of down[r][k] * C[r].
uint32_t project_together(const Together<4>& rows, const float* down, float* across, int64_t stride,
                          float limit, int64_t n);

// Makes zero of what lies beyond the limit or is NaN; returns how many those are.
uint32_t drop_beyond(float limit, int64_t n, float* values);

void add_values(const float* values, int64_t n, float* total);

}  // namespace dear::compress::cpu
