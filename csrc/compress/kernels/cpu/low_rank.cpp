#include "compress/kernels/cpu/low_rank.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "compress/kernels/cpu/cast.h"
#include "compress/kernels/cpu/error_feedback.h"
#include "compress/kernels/cpu/isa.h"
#include "compress/kernels/cpu/scratch.h"

// The rank is worked on in tiles of four, and padded with zeros to whole tiles: what that computes in vain
// costs less than memory does. What stands across a matrix is [padded rank, columns], what stands down its
// side is [rows, padded rank].

namespace dear::compress::cpu {

namespace {

constexpr int64_t kTile = 4;

// Elements a thread takes at least.
constexpr int64_t kGrain = 32768;

// The same in units of so many elements.
int64_t grain_of(int64_t unit) { return ceil_div(kGrain, std::max<int64_t>(unit, 1)); }

// As many terms are summed in float32 before the sum is added to the total: long sums stay accurate.
constexpr int64_t kSumColumns = 4096;

// A tall matrix is summed in parts, which threads may share; not more of them than this, since each needs a
// sum of its own.
constexpr int64_t kPartRows = 256;
constexpr int64_t kMaxParts = 16;

// How many rows a part has: whole tiles, and the shape alone decides.
int64_t part_rows(int64_t rows) {
  return std::max(kPartRows, ceil_div(ceil_div(rows, kMaxParts), kTile) * kTile);
}

}  // namespace

// sums[k] += a . across[k], sums[4 + k] += b . across[k]
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

// across[k] += sum over four rows i of down[i][k] * rows[i], for k of one tile.
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

// out = row - sum over k of one tile of down[k] * across[k]; `out` may be `row`.
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

// kept = values where those are finite; returns how many are not.
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

// Makes zero of what lies beyond the limit or is NaN; returns how many those are.
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

namespace {

// What is asked, and what both directions share.
struct Sweep {
  const BatchShape& batch;
  const Projection& projection;
  const int64_t rank;  // padded
  std::atomic<int64_t> dropped{0};

  Sweep(const BatchShape& batch, const Projection& projection)
      : batch(batch), projection(projection), rank(padded_rank(batch.rank)) {}

  void drop(int64_t count) {
    if (count != 0) dropped.fetch_add(count, std::memory_order_relaxed);
  }

  float* row(int64_t matrix, int64_t index) const {
    return projection.error + (matrix * batch.rows + index) * batch.columns;
  }

  // The row of the error after the gradient was added.
  float* correct(int64_t matrix, int64_t index) {
    float* kept = row(matrix, index);
    if (projection.grad != nullptr) {
      const int64_t start = projection.starts[matrix] + index * batch.columns;
      drop(correct_run(element(projection.grad, projection.type, start), projection.type, kept, batch.columns,
                       kLargestElement));
    }
    return kept;
  }

  // kept -= down . across. `scratch` is one row.
  void subtract(float* kept, const float* down, const float* across, float* scratch) {
    const int64_t n = batch.columns;
    for (int64_t k = 0; k < rank; k += kTile) {
      subtract_tile(k == 0 ? kept : scratch, down + k, across + k * n, n, n, scratch);
    }
    drop(keep_finite(scratch, kept, n));
  }
};

// P = C Q, two rows at a time: a row is corrected, projected, and reduced to its residual in the first-level
// cache.
constexpr int64_t kRows = 2;

// The parts of a thread's scratch.
struct RowScratch {
  float* across;  // Q^T
  float* down;    // kRows rows of P
  float* row;

  explicit RowScratch(const Sweep& sweep)
      : across(thread_scratch<float>((sweep.rank + 1) * sweep.batch.columns + kRows * sweep.rank)),
        down(across + sweep.rank * sweep.batch.columns),
        row(down + kRows * sweep.rank) {}
};

void project_two_rows(Sweep& sweep, int64_t matrix, int64_t first, const RowScratch& scratch) {
  const BatchShape& batch = sweep.batch;
  const Projection& projection = sweep.projection;
  const int64_t rank = sweep.rank;
  const int64_t count = std::min(kRows, batch.rows - first);
  float* const top = sweep.correct(matrix, first);
  float* const rows[kRows] = {top, count < kRows ? top : sweep.correct(matrix, first + 1)};
  for (int64_t k = 0; k < rank; k += kTile) {
    float sums[kRows * kTile] = {};
    for (int64_t column = 0; column < batch.columns; column += kSumColumns) {
      dot_two_rows(rows[0] + column, rows[1] + column, scratch.across + k * batch.columns + column,
                   batch.columns, std::min(kSumColumns, batch.columns - column), sums);
    }
    for (int64_t i = 0; i < kRows; ++i) std::copy_n(sums + i * kTile, kTile, scratch.down + i * rank + k);
  }
  for (int64_t i = 0; i < count; ++i) {
    float* down = scratch.down + i * rank;
    sweep.drop(drop_beyond(kLargestFactor, batch.rank, down));
    std::copy_n(down, batch.rank, projection.factor + (matrix * batch.rows + first + i) * batch.rank);
    if (projection.residual) sweep.subtract(rows[i], down, scratch.across, scratch.row);
  }
}

void project_rows(Sweep& sweep) {
  const BatchShape& batch = sweep.batch;
  const int64_t pairs = ceil_div(batch.rows, kRows);
  at::parallel_for(0, batch.count * pairs, grain_of(kRows * batch.columns), [&](int64_t first, int64_t last) {
    const RowScratch scratch(sweep);
    int64_t entered = -1;
    for (int64_t i = first; i < last; ++i) {
      const int64_t matrix = i / pairs;
      if (matrix != entered) {
        const float* fixed = sweep.projection.fixed + matrix * batch.columns * batch.rank;
        lay_across(fixed, batch.columns, batch.rank, scratch.across);
      }
      entered = matrix;
      project_two_rows(sweep, matrix, i % pairs * kRows, scratch);
    }
  });
}

// Q = C^T P. Whole rows are read, since memory gives short pieces of rows at half the speed, so Q is complete
// only after the last row; then the rows are reduced to their residuals from the last to the first, those
// first that are still in a cache.
class ColumnSweep {
 public:
  ColumnSweep(Sweep& sweep, int64_t matrix)
      : sweep_(sweep),
        matrix_(matrix),
        part_rows_(part_rows(sweep.batch.rows)),
        square_(sweep.rank * sweep.batch.columns),
        down_(thread_scratch<float>(padded_rows() * sweep.rank + (parts() + 1) * square_)),
        total_(down_ + padded_rows() * sweep.rank) {
    const BatchShape& batch = sweep_.batch;
    const int64_t rank = sweep_.rank;
    const float* fixed = sweep.projection.fixed + matrix * batch.rows * batch.rank;
    std::fill(down_, down_ + padded_rows() * rank, 0.0f);
    for (int64_t row = 0; row < batch.rows; ++row) {
      std::copy_n(fixed + row * batch.rank, batch.rank, down_ + row * rank);
    }
  }

  int64_t parts() const { return ceil_div(sweep_.batch.rows, part_rows_); }

  // Corrects the rows of one part, and sums up its share of Q^T.
  void project(int64_t part) const {
    const BatchShape& batch = sweep_.batch;
    const int64_t rank = sweep_.rank;
    float* across = part_of(part);
    std::fill(across, across + square_, 0.0f);
    for (int64_t row = begin(part); row < begin(part + 1); row += kTile) {
      // Behind the last row those of P are zero: any row of C will do.
      float* const top = sweep_.correct(matrix_, row);
      const float* rows[kTile] = {top, top, top, top};
      for (int64_t i = 1; i < std::min(kTile, batch.rows - row); ++i) {
        rows[i] = sweep_.correct(matrix_, row + i);
      }
      for (int64_t k = 0; k < rank; k += kTile) {
        add_four_rows(rows, down_ + row * rank + k, rank, batch.columns, across + k * batch.columns,
                      batch.columns);
      }
    }
  }

  // Adds the shares in order. See Note [Overflow in low-rank factors].
  void finish() const {
    const BatchShape& batch = sweep_.batch;
    std::fill(total_, total_ + square_, 0.0f);
    for (int64_t part = 0; part < parts(); ++part) add_values(part_of(part), square_, total_);
    sweep_.drop(drop_beyond(kLargestFactor, batch.rank * batch.columns, total_));
    float* factor = sweep_.projection.factor + matrix_ * batch.columns * batch.rank;
    for (int64_t column = 0; column < batch.columns; ++column) {
      for (int64_t k = 0; k < batch.rank; ++k) {
        factor[column * batch.rank + k] = total_[k * batch.columns + column];
      }
    }
  }

  // Reduces the rows of one part to their residuals.
  void subtract(int64_t part) const {
    for (int64_t row = begin(part + 1) - 1; row >= begin(part); --row) {
      sweep_.subtract(sweep_.row(matrix_, row), down_ + row * sweep_.rank, total_, part_of(part));
    }
  }

 private:
  int64_t padded_rows() const { return ceil_div(sweep_.batch.rows, kTile) * kTile; }
  int64_t begin(int64_t part) const { return std::min(part * part_rows_, sweep_.batch.rows); }
  float* part_of(int64_t part) const { return total_ + (part + 1) * square_; }

  Sweep& sweep_;
  const int64_t matrix_;
  const int64_t part_rows_;
  const int64_t square_;  // elements of Q^T
  float* const down_;     // P
  float* const total_;    // Q^T, and behind it the share of each part
};

void project_columns(Sweep& sweep) {
  // One thread takes a matrix from start to end. Those that do not come out even are shared by all.
  const BatchShape& batch = sweep.batch;
  const int64_t count = batch.count;
  const int64_t whole = count - count % at::get_num_threads();
  const bool residual = sweep.projection.residual;
  at::parallel_for(0, whole, grain_of(batch.numel()), [&](int64_t first, int64_t last) {
    for (int64_t matrix = first; matrix < last; ++matrix) {
      const ColumnSweep columns(sweep, matrix);
      for (int64_t part = 0; part < columns.parts(); ++part) columns.project(part);
      columns.finish();
      for (int64_t part = columns.parts() - 1; residual && part >= 0; --part) columns.subtract(part);
    }
  });
  const int64_t grain = grain_of(part_rows(batch.rows) * batch.columns);
  for (int64_t matrix = whole; matrix < count; ++matrix) {
    const ColumnSweep columns(sweep, matrix);
    at::parallel_for(0, columns.parts(), grain, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) columns.project(part);
    });
    columns.finish();
    if (!residual) continue;
    at::parallel_for(0, columns.parts(), grain, [&](int64_t first, int64_t last) {
      for (int64_t part = last - 1; part >= first; --part) columns.subtract(part);
    });
  }
}

}  // namespace

void lay_across(const float* factor, int64_t length, int64_t rank, float* across) {
  std::fill(across + rank * length, across + padded_rank(rank) * length, 0.0f);
  for (int64_t i = 0; i < length; ++i) {
    for (int64_t k = 0; k < rank; ++k) across[k * length + i] = factor[i * rank + k];
  }
}

int64_t low_rank_project(const BatchShape& batch, const Projection& projection, bool transposed) {
  Sweep sweep(batch, projection);
  transposed ? project_columns(sweep) : project_rows(sweep);
  return sweep.dropped.load();
}

}  // namespace dear::compress::cpu
