#include "compress/kernels/cpu/orthogonalize.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "compress/kernels/cpu/isa.h"
#include "compress/layout.h"

// A fused multiply-add rounds once where two operations round twice: processors with and without it would
// differ.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace dear::compress::cpu {

namespace {

constexpr int64_t kTileRows = 128;
constexpr int kLanes = 8;

// A pivot of the scaled Gram matrix is the squared sine between a column and those before it. Below this the
// float64 Gram matrix no longer tells the sine, and the matrix goes to the fallback.
constexpr double kMinPivot = 1e-11;

// One pass leaves Q orthogonal to about 1e-15 * |inverse R|^2. Above this a second pass is needed.
constexpr double kOnePass = 1e7;
constexpr int kMaxPasses = 3;

// A column whose part outside the span of those before it is less than this share of it is taken as
// dependent.
constexpr double kDependent = 1e-6;

// What a matrix still needs; kept in the workspace, hence a double.
using Status = double;
constexpr Status kDone = 0;
constexpr Status kApplyOnce = 1;
constexpr Status kApplyAgain = 2;
constexpr Status kFallback = 3;

}  // namespace

// tile[column][row] = source[row][column], rows behind `rows` filled with zeros.
DEAR_CLONES void load_tile(const float* source, int64_t rows, int64_t columns, double* tile) {
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t row = 0; row < rows; ++row) {
      const float value = source[row * columns + column];
      tile[column * kTileRows + row] = is_finite(value) ? value : 0.0f;
    }
    for (int64_t row = rows; row < kTileRows; ++row) tile[column * kTileRows + row] = 0.0;
  }
}

// gram (upper triangle) += tile^T tile.
DEAR_CLONES void add_gram(const double* tile, int64_t columns, double* gram) {
  for (int64_t i = 0; i < columns; ++i) {
    const double* a = tile + i * kTileRows;
    for (int64_t j = i; j < columns; ++j) {
      const double* b = tile + j * kTileRows;
      double sums[kLanes] = {};
      for (int64_t row = 0; row < kTileRows; row += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) sums[lane] += a[row + lane] * b[row + lane];
      }
      gram[i * columns + j] +=
          ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
    }
  }
}

// target[row][j] = sum over i <= j of tile[i][row] * inverse[i][j].
DEAR_CLONES void apply_tile(const double* tile, const double* inverse, int64_t rows, int64_t columns,
                            float* target) {
  for (int64_t j = 0; j < columns; ++j) {
    double sums[kTileRows] = {};
    for (int64_t i = 0; i <= j; ++i) {
      const double factor = inverse[i * columns + j];
      const double* a = tile + i * kTileRows;
      for (int64_t row = 0; row < kTileRows; ++row) sums[row] += a[row] * factor;
    }
    for (int64_t row = 0; row < rows; ++row) target[row * columns + j] = static_cast<float>(sums[row]);
  }
}

DEAR_CLONES double dot(const double* a, const double* b, int64_t n) {
  double sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  }
  for (int lane = 0; i < n; ++i, ++lane) sums[lane] += a[i] * b[i];
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

DEAR_CLONES void subtract_scaled(double* a, const double* b, double factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) a[i] -= factor * b[i];
}

namespace {

// Scratch that grows to its largest use and stays: no allocation in steady state.
double* thread_scratch(int64_t size) {
  static thread_local std::vector<double> scratch;
  if (static_cast<int64_t>(scratch.size()) < size) scratch.resize(size);
  return scratch.data();
}

// Turns the Gram matrix (upper triangle) into the inverse of its Cholesky factor R, in place.
Status invert_cholesky(double* gram, int64_t r) {
  // Scaling the columns to unit length first makes the pivots, and the bound below, independent of units.
  double* length = thread_scratch(r);
  for (int64_t i = 0; i < r; ++i) {
    length[i] = std::sqrt(gram[i * r + i]);
    if (!(length[i] > 0)) return kFallback;
  }
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = i; j < r; ++j) gram[i * r + j] /= length[i] * length[j];
  }
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t k = 0; k < i; ++k) {
      const double factor = gram[k * r + i];
      for (int64_t j = i; j < r; ++j) gram[i * r + j] -= factor * gram[k * r + j];
    }
    const double pivot = gram[i * r + i];
    if (!(pivot > kMinPivot)) return kFallback;
    const double root = std::sqrt(pivot);
    for (int64_t j = i; j < r; ++j) gram[i * r + j] /= root;
  }
  // Back substitution column by column; column j needs of R only rows up to j, which are still in place.
  double norm = 0;
  for (int64_t j = r - 1; j >= 0; --j) {
    const double diagonal = 1.0 / gram[j * r + j];
    for (int64_t i = j - 1; i >= 0; --i) {
      double sum = gram[i * r + j] * diagonal;
      for (int64_t k = i + 1; k < j; ++k) sum += gram[i * r + k] * gram[k * r + j];
      gram[i * r + j] = -sum / gram[i * r + i];
    }
    gram[j * r + j] = diagonal;
  }
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = i; j < r; ++j) {
      norm += gram[i * r + j] * gram[i * r + j];
      gram[i * r + j] /= length[i];
    }
  }
  return norm < kOnePass ? kApplyOnce : kApplyAgain;
}

// Gram-Schmidt, every column made orthogonal twice, for matrices whose columns depend on each other.
void gram_schmidt(float* matrix, int64_t rows, int64_t columns) {
  std::vector<double> basis(rows * columns);
  for (int64_t column = 0; column < columns; ++column) {
    double* v = basis.data() + column * rows;
    for (int64_t row = 0; row < rows; ++row) {
      const float value = matrix[row * columns + column];
      v[row] = is_finite(value) ? value : 0.0f;
    }
    const double before = std::sqrt(dot(v, v, rows));
    const auto orthogonalize_twice = [&] {
      for (int round = 0; round < 2; ++round) {
        for (int64_t k = 0; k < column; ++k) {
          const double* q = basis.data() + k * rows;
          subtract_scaled(v, q, dot(q, v, rows), rows);
        }
      }
      return std::sqrt(dot(v, v, rows));
    };
    double after = orthogonalize_twice();
    if (!(after > kDependent * before)) {
      // The squares of what unit vectors keep outside the span sum up to rows - column: one keeps the mean.
      const double enough = 0.5 * static_cast<double>(rows - column) / static_cast<double>(rows);
      int64_t unit = 0;
      for (; unit < rows - 1; ++unit) {
        double kept = 1;
        for (int64_t k = 0; k < column; ++k) kept -= basis[k * rows + unit] * basis[k * rows + unit];
        if (kept >= enough) break;
      }
      std::fill(v, v + rows, 0.0);
      v[unit] = 1;
      after = orthogonalize_twice();
    }
    for (int64_t row = 0; row < rows; ++row) v[row] /= after;
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      matrix[row * columns + column] = static_cast<float>(basis[column * rows + row]);
    }
  }
}

// Calls tile(matrix, first row, rows) for the tiles of part `part` of the batch.
template <typename F>
void for_tiles(int64_t part, int64_t rows, const F& tile) {
  const int64_t parts = ceil_div(rows, kGramRows);
  const int64_t first = part % parts * kGramRows;
  const int64_t last = std::min(rows, first + kGramRows);
  for (int64_t row = first; row < last; row += kTileRows) {
    tile(part / parts, row, std::min(kTileRows, last - row));
  }
}

}  // namespace

void orthogonalize(float* matrices, int64_t batch, int64_t rows, int64_t columns, double* workspace) {
  const int64_t parts = ceil_div(rows, kGramRows);
  const int64_t square = columns * columns;
  double* status = workspace + batch * parts * square;
  std::fill(status, status + batch, kApplyAgain);

  bool again = batch > 0;
  for (int pass = 0; pass < kMaxPasses && again; ++pass) {
    at::parallel_for(0, batch * parts, 1, [&](int64_t first, int64_t last) {
      double* tile = thread_scratch(kTileRows * columns);
      for (int64_t part = first; part < last; ++part) {
        if (status[part / parts] != kApplyAgain) continue;
        double* gram = workspace + part * square;
        std::fill(gram, gram + square, 0.0);
        for_tiles(part, rows, [&](int64_t matrix, int64_t row, int64_t count) {
          load_tile(matrices + (matrix * rows + row) * columns, count, columns, tile);
          add_gram(tile, columns, gram);
        });
      }
    });
    at::parallel_for(0, batch, 1, [&](int64_t first, int64_t last) {
      for (int64_t matrix = first; matrix < last; ++matrix) {
        if (status[matrix] != kApplyAgain) continue;
        double* gram = workspace + matrix * parts * square;
        for (int64_t part = 1; part < parts; ++part) {
          for (int64_t i = 0; i < square; ++i) gram[i] += gram[part * square + i];
        }
        status[matrix] = invert_cholesky(gram, columns);
      }
    });
    at::parallel_for(0, batch * parts, 1, [&](int64_t first, int64_t last) {
      double* tile = thread_scratch(kTileRows * columns);
      for (int64_t part = first; part < last; ++part) {
        const Status todo = status[part / parts];
        if (todo != kApplyOnce && todo != kApplyAgain) continue;
        for_tiles(part, rows, [&](int64_t matrix, int64_t row, int64_t count) {
          float* target = matrices + (matrix * rows + row) * columns;
          load_tile(target, count, columns, tile);
          apply_tile(tile, workspace + matrix * parts * square, count, columns, target);
        });
      }
    });
    again = false;
    for (int64_t matrix = 0; matrix < batch; ++matrix) {
      if (status[matrix] == kApplyOnce) status[matrix] = kDone;
      again = again || status[matrix] == kApplyAgain;
    }
  }
  at::parallel_for(0, batch, 1, [&](int64_t first, int64_t last) {
    for (int64_t matrix = first; matrix < last; ++matrix) {
      if (status[matrix] != kDone) gram_schmidt(matrices + matrix * rows * columns, rows, columns);
    }
  });
}

}  // namespace dear::compress::cpu
