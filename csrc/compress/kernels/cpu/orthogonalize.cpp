#include "compress/kernels/cpu/orthogonalize.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "compress/kernels/cpu/scratch.h"
#include "compress/layout.h"
#include "float_bits.h"
#include "isa.h"

namespace dear::compress::cpu {

namespace plain {
#define DEAR_LANES 4
#include "compress/kernels/cpu/orthogonalize_tiles.inc"
#undef DEAR_LANES
}  // namespace plain

#ifdef DEAR_HAS_CLONES
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {
#define DEAR_LANES 4
#include "compress/kernels/cpu/orthogonalize_tiles.inc"
#undef DEAR_LANES
}  // namespace v3
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace v4 {
#define DEAR_LANES 8
#include "compress/kernels/cpu/orthogonalize_tiles.inc"
#undef DEAR_LANES
}  // namespace v4
#pragma GCC pop_options
#endif

// From here on products are not exact. A fused multiply-add rounds once where two operations round twice, and
// processors with and without it would differ.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace {

// Rows of a tile: with 32 columns, a tile and a Gram matrix fit the first-level cache.
constexpr int64_t kTileRows = 64;
constexpr int kLanes = 8;

// A pivot of the scaled Gram matrix is the squared sine between a column and those before it. Below this the
// float64 Gram matrix no longer tells the sine, and the matrix goes to the fallback.
constexpr double kMinPivot = 1e-11;

// The inverse of R is rounded to 29 bits, so that its products with float32 are exact. One pass then leaves Q
// orthogonal to about 1e-9 times the norm of the inverse; above this square of it, a second pass is needed.
constexpr double kOnePass = 1e6;
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

// Rows are worked on from a multiple of four: what that touches left of the diagonal is never read, or zero.
constexpr int64_t kWhole = ~int64_t{3};

constexpr double kInfinite = std::numeric_limits<double>::infinity();

double round_to_29_bits(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = (bits + (uint64_t{1} << 23)) & ~((uint64_t{1} << 24) - 1);
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

struct Tiles {
  void (*load_tile)(const float*, int64_t, int64_t, int64_t, double*);
  void (*add_gram)(const double*, int64_t, int64_t, double*);
  void (*apply_tile)(const double*, const double*, int64_t, int64_t, float*);
};

const Tiles& tiles() {
  static const Tiles chosen = [] {
#ifdef DEAR_HAS_CLONES
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512cd")) {
      return Tiles{v4::load_tile, v4::add_gram, v4::apply_tile};
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
        __builtin_cpu_supports("f16c")) {
      return Tiles{v3::load_tile, v3::add_gram, v3::apply_tile};
    }
#endif
    return Tiles{plain::load_tile, plain::add_gram, plain::apply_tile};
  }();
  return chosen;
}

}  // namespace

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

// Turns the Gram matrix [r, r], rows `stride` apart (upper triangle), into the inverse of its Cholesky factor
// R, in place, with zeros below the diagonal and in the padding. `row` is scratch of r.
DEAR_CLONES Status invert_cholesky(double* gram, int64_t r, int64_t stride, double* row) {
  // Scaling the columns to unit length first makes the pivots, and the bound below, independent of units.
  double* length = row + r;
  for (int64_t i = 0; i < r; ++i) {
    length[i] = std::sqrt(gram[i * stride + i]);
    if (!(length[i] > 0) || !(length[i] < kInfinite)) return kFallback;
  }
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = i; j < r; ++j) gram[i * stride + j] /= length[i] * length[j];
  }
  for (int64_t i = 0; i < r; ++i) {
    double* target = gram + i * stride;
    for (int64_t k = 0; k < i; ++k) {
      const double* source = gram + k * stride;
      const double factor = source[i];
      for (int64_t j = i & kWhole; j < stride; ++j) target[j] -= factor * source[j];
    }
    if (!(target[i] > kMinPivot)) return kFallback;
    const double root = 1.0 / std::sqrt(target[i]);
    for (int64_t j = i & kWhole; j < stride; ++j) target[j] *= root;
  }
  // R * inverse = I, solved row by row from the last: the rows below are inverted already.
  double norm = 0;
  for (int64_t i = r - 1; i >= 0; --i) {
    double* target = gram + i * stride;
    for (int64_t j = i; j < r; ++j) row[j] = target[j];
    for (int64_t j = 0; j < stride; ++j) target[j] = j == i ? 1.0 : 0.0;
    for (int64_t k = i + 1; k < r; ++k) {
      const double* source = gram + k * stride;
      const double factor = row[k];
      for (int64_t j = k & kWhole; j < stride; ++j) target[j] -= factor * source[j];
    }
    const double diagonal = row[i];
    for (int64_t j = i & kWhole; j < stride; ++j) target[j] /= diagonal;
  }
  for (int64_t i = 0; i < r; ++i) {
    double* target = gram + i * stride;
    for (int64_t j = i; j < r; ++j) {
      norm += target[j] * target[j];
      target[j] = round_to_29_bits(target[j] / length[i]);
    }
  }
  for (int64_t i = r; i < stride; ++i) std::fill(gram + i * stride, gram + (i + 1) * stride, 0.0);
  return norm < kOnePass ? kApplyOnce : kApplyAgain;
}

namespace {

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

// The matrices of one call, and the parts into which their rows are cut. The cut depends on the shape alone.
struct Batch {
  float* matrices;
  int64_t rows;
  int64_t columns;
  double* workspace;
  double* status;
  int64_t parts = ceil_div(rows, kGramRows);
  int64_t stride = padded_rank(columns);
  int64_t square = stride * stride;

  float* row(int64_t matrix, int64_t index) const { return matrices + (matrix * rows + index) * columns; }
  double* gram(int64_t matrix, int64_t part) const { return workspace + (matrix * parts + part) * square; }

  // The Gram matrix of one part of the rows.
  void sum_part(int64_t matrix, int64_t part) const {
    double* tile = zeroed_tile();
    double* target = gram(matrix, part);
    std::fill(target, target + square, 0.0);
    for_tiles(part, [&](int64_t first, int64_t count) {
      tiles().load_tile(row(matrix, first), count, columns, stride, tile);
      tiles().add_gram(tile, count, stride, target);
    });
  }

  // Adds the parts in order, and turns the sum into what the rows are to be multiplied by.
  void invert(int64_t matrix) const {
    double* total = gram(matrix, 0);
    for (int64_t part = 1; part < parts; ++part) {
      const double* other = gram(matrix, part);
      for (int64_t i = 0; i < square; ++i) total[i] += other[i];
    }
    status[matrix] = invert_cholesky(total, columns, stride, thread_scratch<double>(2 * columns));
  }

  void apply_part(int64_t matrix, int64_t part) const {
    double* tile = zeroed_tile();
    float* buffer = reinterpret_cast<float*>(tile + kTileRows * stride);
    for_tiles(part, [&](int64_t first, int64_t count) {
      float* target = row(matrix, first);
      const bool direct = columns == stride && count % 4 == 0;
      tiles().load_tile(target, count, columns, stride, tile);
      tiles().apply_tile(tile, gram(matrix, 0), ceil_div(count, 4) * 4, stride, direct ? target : buffer);
      if (direct) return;
      for (int64_t i = 0; i < count; ++i) {
        std::copy(buffer + i * stride, buffer + i * stride + columns, target + i * columns);
      }
    });
  }

  bool applies(int64_t matrix) const { return status[matrix] == kApplyOnce || status[matrix] == kApplyAgain; }

 private:
  double* zeroed_tile() const {
    double* tile = thread_scratch<double>(2 * kTileRows * stride);
    std::fill(tile, tile + kTileRows * stride, 0.0);
    return tile;
  }

  template <typename F>
  void for_tiles(int64_t part, const F& visit) const {
    const int64_t last = std::min(rows, (part + 1) * kGramRows);
    for (int64_t first = part * kGramRows; first < last; first += kTileRows) {
      visit(first, std::min(kTileRows, last - first));
    }
  }
};

// One thread takes a matrix from start to end, while it is in the cache.
void orthogonalize_whole(const Batch& batch, int64_t matrix) {
  for (int pass = 0; pass < kMaxPasses && batch.status[matrix] == kApplyAgain; ++pass) {
    for (int64_t part = 0; part < batch.parts; ++part) batch.sum_part(matrix, part);
    batch.invert(matrix);
    if (!batch.applies(matrix)) break;
    for (int64_t part = 0; part < batch.parts; ++part) batch.apply_part(matrix, part);
    if (batch.status[matrix] == kApplyOnce) batch.status[matrix] = kDone;
  }
  if (batch.status[matrix] != kDone) gram_schmidt(batch.row(matrix, 0), batch.rows, batch.columns);
}

// All threads share the rows of one matrix.
void orthogonalize_shared(const Batch& batch, int64_t matrix) {
  for (int pass = 0; pass < kMaxPasses && batch.status[matrix] == kApplyAgain; ++pass) {
    at::parallel_for(0, batch.parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) batch.sum_part(matrix, part);
    });
    batch.invert(matrix);
    if (!batch.applies(matrix)) break;
    at::parallel_for(0, batch.parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) batch.apply_part(matrix, part);
    });
    if (batch.status[matrix] == kApplyOnce) batch.status[matrix] = kDone;
  }
  if (batch.status[matrix] != kDone) gram_schmidt(batch.row(matrix, 0), batch.rows, batch.columns);
}

}  // namespace

void orthogonalize(float* matrices, int64_t count, int64_t rows, int64_t columns, double* workspace) {
  const int64_t stride = padded_rank(columns);
  double* status = workspace + count * ceil_div(rows, kGramRows) * stride * stride;
  std::fill(status, status + count, kApplyAgain);
  const Batch batch{matrices, rows, columns, workspace, status};

  // The matrices that do not come out even among the threads, when they are tall, are shared by all.
  const int64_t threads = at::get_num_threads();
  const int64_t whole = batch.parts == 1 ? count : count - count % threads;
  at::parallel_for(0, whole, 1, [&](int64_t first, int64_t last) {
    for (int64_t matrix = first; matrix < last; ++matrix) orthogonalize_whole(batch, matrix);
  });
  for (int64_t matrix = whole; matrix < count; ++matrix) orthogonalize_shared(batch, matrix);
}

}  // namespace dear::compress::cpu
