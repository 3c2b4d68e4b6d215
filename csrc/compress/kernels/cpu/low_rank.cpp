#include "compress/kernels/cpu/low_rank.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "compress/kernels/cpu/cast.h"
#include "compress/kernels/cpu/error_feedback.h"
#include "compress/kernels/cpu/low_rank_loops.h"
#include "compress/kernels/cpu/scratch.h"

// The rank is worked on in tiles of four, and padded with zeros to whole tiles: what that computes in vain
// costs less than memory does. What stands across a matrix is [padded rank, columns], what stands down its
// side is [rows, padded rank].

namespace dear::compress::cpu {

namespace {

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

  bool has_pending() const { return projection.pending_p != nullptr; }

  float* row(int64_t matrix, int64_t index) const {
    return projection.error + (matrix * batch.rows + index) * batch.columns;
  }

  // What one thread needs to take the pending factors out of rows: Q^T of the matrix, a row of P, and a row
  // of scratch.
  struct Pending {
    float* across = nullptr;
    float* down = nullptr;
    float* row = nullptr;
  };

  // The row of the error, after what is pending was taken out and the gradient was added. See Note [Four
  // passes].
  float* correct(int64_t matrix, int64_t index, const Pending& pending) {
    float* kept = row(matrix, index);
    if (has_pending()) {
      const float* p = projection.pending_p + (matrix * batch.rows + index) * batch.rank;
      std::fill(std::copy_n(p, batch.rank, pending.down), pending.down + rank, 0.0f);
    }
    if (projection.grad == nullptr) {
      if (has_pending()) subtract(kept, pending.down, pending.across, pending.row);
      return kept;
    }
    const int64_t start = projection.starts[matrix] + index * batch.columns;
    if (has_pending()) {
      subtract_and_add_row(kept, start, pending);
    } else {
      drop(correct_run(element(projection.grad, projection.type, start), projection.type, kept, batch.columns,
                       kLargestElement));
    }
    return kept;
  }

  // kept -= the pending factors, and += the gradient from `start` on, in one pass over both.
  void subtract_and_add_row(float* kept, int64_t start, const Pending& pending) {
    float scratch[kBlock];
    const int64_t n = batch.columns;
    const int64_t last = rank - kTile;
    for (int64_t k = 0; k < last; k += kTile) {
      const float* base = k == 0 ? kept : pending.row;
      subtract_tile(base, pending.down + k, pending.across + k * n, n, n, pending.row);
    }
    const float* down = pending.down + last;
    for (int64_t offset = 0; offset < n; offset += kBlock) {
      const int64_t length = std::min(kBlock, n - offset);
      const float* grad = load_block(element(projection.grad, projection.type, start + offset),
                                     projection.type, length, scratch);
      const float* across = pending.across + last * n + offset;
      drop(last == 0 ? subtract_and_add(down, across, n, grad, kLargestElement, length, kept + offset)
                     : subtract_last_and_add(pending.row + offset, down, across, n, grad, kLargestElement,
                                             length, kept + offset));
    }
  }

  // Whether the first sweep of a step does all in one pass: the rank is one tile.
  bool at_once() const { return projection.grad != nullptr && rank == kTile; }

  // Calls visit(rows, offset, length) for the pieces of kCount rows from `first` on. `across`: of the pending
  // Q; zeros where nothing is pending.
  template <int64_t kCount, typename Visit>
  void together(int64_t matrix, int64_t first, const float* across, const Visit& visit) {
    static const float zeros[kBlock] = {};
    alignas(64) float scratch[kCount][kBlock];
    Together<kCount> rows;
    for (int64_t r = 0; r < kCount; ++r) {
      std::fill(rows.pending[r], rows.pending[r] + kTile, 0.0f);
      if (!has_pending() || first + r >= batch.rows) continue;
      std::copy_n(projection.pending_p + (matrix * batch.rows + first + r) * batch.rank, batch.rank,
                  rows.pending[r]);
    }
    for (int64_t offset = 0; offset < batch.columns; offset += kBlock) {
      const int64_t length = std::min(kBlock, batch.columns - offset);
      rows.pending_across = across + offset;
      for (int64_t r = 0; r < kCount; ++r) {
        if (first + r >= batch.rows) {
          std::fill(scratch[r], scratch[r] + length, 0.0f);
          rows.kept[r] = scratch[r];
          rows.grad[r] = zeros;
          continue;
        }
        const int64_t start = projection.starts[matrix] + (first + r) * batch.columns + offset;
        rows.kept[r] = row(matrix, first + r) + offset;
        rows.grad[r] =
            load_block(element(projection.grad, projection.type, start), projection.type, length, scratch[r]);
      }
      visit(rows, offset, length);
    }
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
  Sweep::Pending pending;

  explicit RowScratch(const Sweep& sweep) {
    const int64_t square = sweep.rank * sweep.batch.columns;
    across = thread_scratch<float>(2 * square + sweep.batch.columns + (kRows + 1) * sweep.rank);
    pending.across = across + square;
    row = pending.row = pending.across + square;
    down = row + sweep.batch.columns;
    pending.down = down + kRows * sweep.rank;
  }
  void enter(const Sweep& sweep, int64_t matrix) const {
    const int64_t begin = matrix * sweep.batch.columns * sweep.batch.rank;
    if (sweep.projection.fixed != nullptr) {
      lay_across(sweep.projection.fixed + begin, sweep.batch.columns, sweep.batch.rank, across);
    }
    if (sweep.has_pending()) {
      lay_across(sweep.projection.pending_q + begin, sweep.batch.columns, sweep.batch.rank, pending.across);
    } else {
      std::fill(pending.across, pending.across + sweep.rank * sweep.batch.columns, 0.0f);
    }
  }
};

// Corrects two rows of one tile of ranks, and writes their products with the fixed factor, in one pass.
void multiply_at_once(Sweep& sweep, int64_t matrix, int64_t first, const RowScratch& scratch) {
  std::fill(scratch.down, scratch.down + kRows * kTile, 0.0f);
  sweep.together<kRows>(matrix, first, scratch.pending.across,
                        [&](const Together<kRows>& rows, int64_t offset, int64_t n) {
                          sweep.drop(project_together(rows, scratch.across + offset, sweep.batch.columns,
                                                      kLargestElement, n, scratch.down));
                        });
}

// The same for any rank: the rows are corrected first, and then multiplied tile by tile, in a cache.
void multiply_by_tiles(Sweep& sweep, int64_t matrix, int64_t first, const RowScratch& scratch) {
  const int64_t columns = sweep.batch.columns;
  float* const top = sweep.correct(matrix, first, scratch.pending);
  float* const other = first + 1 < sweep.batch.rows ? sweep.correct(matrix, first + 1, scratch.pending) : top;
  for (int64_t k = 0; k < sweep.rank; k += kTile) {
    float sums[kRows * kTile] = {};
    for (int64_t column = 0; column < columns; column += kSumColumns) {
      dot_two_rows(top + column, other + column, scratch.across + k * columns + column, columns,
                   std::min(kSumColumns, columns - column), sums);
    }
    for (int64_t i = 0; i < kRows; ++i) {
      std::copy_n(sums + i * kTile, kTile, scratch.down + i * sweep.rank + k);
    }
  }
}

void project_two_rows(Sweep& sweep, int64_t matrix, int64_t first, const RowScratch& scratch) {
  const BatchShape& batch = sweep.batch;
  const Projection& projection = sweep.projection;
  (sweep.at_once() ? multiply_at_once : multiply_by_tiles)(sweep, matrix, first, scratch);
  for (int64_t i = 0; i < std::min(kRows, batch.rows - first); ++i) {
    float* down = scratch.down + i * sweep.rank;
    sweep.drop(drop_beyond(kLargestFactor, batch.rank, down));
    std::copy_n(down, batch.rank, projection.factor + (matrix * batch.rows + first + i) * batch.rank);
    if (projection.residual) {
      sweep.subtract(sweep.row(matrix, first + i), down, scratch.across, scratch.row);
    }
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
      if (matrix != entered) scratch.enter(sweep, matrix);
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
        down_(thread_scratch<float>(padded_rows() * sweep.rank + (parts() + 2) * square_ +
                                    parts() * (sweep.batch.columns + sweep.rank))),
        total_(down_ + padded_rows() * sweep.rank),
        pending_(total_ + (parts() + 1) * square_) {
    const BatchShape& batch = sweep_.batch;
    const int64_t rank = sweep_.rank;
    const float* fixed = sweep.projection.fixed + matrix * batch.rows * batch.rank;
    std::fill(down_, down_ + padded_rows() * rank, 0.0f);
    for (int64_t row = 0; row < batch.rows; ++row) {
      std::copy_n(fixed + row * batch.rank, batch.rank, down_ + row * rank);
    }
    if (sweep.has_pending()) {
      const float* q = sweep.projection.pending_q + matrix * batch.columns * batch.rank;
      lay_across(q, batch.columns, batch.rank, pending_);
    } else {
      std::fill(pending_, pending_ + square_, 0.0f);
    }
  }

  int64_t parts() const { return ceil_div(sweep_.batch.rows, part_rows_); }

  // Corrects the rows of one part, and sums up its share of Q^T.
  void project(int64_t part) const {
    const BatchShape& batch = sweep_.batch;
    const int64_t rank = sweep_.rank;
    float* across = part_of(part);
    float* own = pending_ + square_ + part * (batch.columns + rank);
    const Sweep::Pending pending{pending_, own + batch.columns, own};
    std::fill(across, across + square_, 0.0f);
    for (int64_t row = begin(part); row < begin(part + 1); row += kTile) {
      if (sweep_.at_once()) {
        const float* down = down_ + row * rank;
        sweep_.together<kTile>(
            matrix_, row, pending_, [&](const Together<kTile>& rows, int64_t offset, int64_t n) {
              sweep_.drop(project_together(rows, down, across + offset, batch.columns, kLargestElement, n));
            });
        continue;
      }
      // Behind the last row those of P are zero: any row of C will do.
      float* const top = sweep_.correct(matrix_, row, pending);
      const float* rows[kTile] = {top, top, top, top};
      for (int64_t i = 1; i < std::min(kTile, batch.rows - row); ++i) {
        rows[i] = sweep_.correct(matrix_, row + i, pending);
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
  float* const pending_;  // Q^T of the pending factors, and behind it each part's row and row of P
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

int64_t low_rank_subtract(const BatchShape& batch, const float* p, const float* q, float* error) {
  const Projection projection{nullptr, GradType::kFloat32, nullptr, error, nullptr, nullptr, false, p, q};
  Sweep sweep(batch, projection);
  at::parallel_for(0, batch.count * batch.rows, grain_of(batch.columns), [&](int64_t first, int64_t last) {
    const RowScratch scratch(sweep);
    int64_t entered = -1;
    for (int64_t i = first; i < last; ++i) {
      const int64_t matrix = i / batch.rows;
      if (matrix != entered) scratch.enter(sweep, matrix);
      entered = matrix;
      sweep.correct(matrix, i % batch.rows, scratch.pending);
    }
  });
  return sweep.dropped.load();
}

int64_t low_rank_project(const BatchShape& batch, const Projection& projection, bool transposed) {
  Sweep sweep(batch, projection);
  transposed ? project_columns(sweep) : project_rows(sweep);
  return sweep.dropped.load();
}

}  // namespace dear::compress::cpu
