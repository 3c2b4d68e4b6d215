// The loops of the low-rank kernels along the rows of matrices. The rank is worked on in tiles of four.
#pragma once

#include <cstdint>

namespace dear::compress::cpu {

constexpr int64_t kTile = 4;

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

// Makes zero of what lies beyond the limit or is NaN; returns how many those are.
uint32_t drop_beyond(float limit, int64_t n, float* values);

void add_values(const float* values, int64_t n, float* total);

}  // namespace dear::compress::cpu
