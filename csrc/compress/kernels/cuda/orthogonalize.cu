#include "compress/kernels/cuda/orthogonalize.cuh"
#include "compress/kernels/cuda/orthogonalize.h"

namespace dear::compress::cuda {

namespace {

// Floats of the tile of rows that a thread block holds in shared memory: 32 KiB.
constexpr int kTileFloats = 8192;

// Up to this rank the Cholesky factor lives in shared memory.
constexpr int kSharedRank = 64;

struct Problem {
  float* matrices;
  int64_t batch;
  int64_t rows;
  int64_t columns;
  int64_t stride;
  int64_t parts;
  double* workspace;

  // For each matrix: a Gram matrix per part, then one more square; behind all of them the status.
  __device__ double* gram(int64_t matrix, int64_t part) const {
    return workspace + (matrix * (parts + 1) + part) * stride * stride;
  }
  __device__ double& status(int64_t matrix) const {
    return workspace[batch * (parts + 1) * stride * stride + matrix];
  }
  __device__ float* row(int64_t matrix, int64_t index) const {
    return matrices + (matrix * rows + index) * columns;
  }
};

__global__ void start_kernel(Problem problem) {
  const int64_t matrix = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (matrix < problem.batch) problem.status(matrix) = kApplyAgain;
}

// Loads rows [first, first + count) into the tile, padding with zeros to `stride` columns.
__device__ void load_tile(const Problem& problem, int64_t matrix, int64_t first, int64_t count, float* tile) {
  const int stride = static_cast<int>(problem.stride);
  for (int i = threadIdx.x; i < count * stride; i += kThreads) {
    const int column = i % stride;
    tile[i] = column < problem.columns ? problem.row(matrix, first + i / stride)[column] : 0.0f;
  }
}

// One thread block per part of a matrix. A thread sums 4 x 4 entries of the upper triangle over a share of
// the rows; the shares are then added in order.
__global__ __launch_bounds__(kThreads) void gram_kernel(Problem problem) {
  __shared__ union {
    alignas(sizeof(float4)) float tile[kTileFloats];  // read four at once
    double sums[kThreads * 16];
  } shared;
  const int64_t matrix = blockIdx.x / problem.parts;
  const int64_t part = blockIdx.x % problem.parts;
  if (problem.status(matrix) != kApplyAgain) return;
  const int stride = static_cast<int>(problem.stride);
  const int side = stride / 4;
  const int tiles = side * side;
  const int shares = tiles < kThreads ? kThreads / tiles : 1;
  const int64_t last = min(problem.rows, (part + 1) * kGramRows);
  const int64_t step = kTileFloats / stride;
  double* gram = problem.gram(matrix, part);

  for (int base = 0; base < tiles; base += kThreads) {
    const int share = static_cast<int>(threadIdx.x) / tiles;  // 0 where there are more tiles than threads
    const int tile =
        base + (tiles < kThreads ? static_cast<int>(threadIdx.x) % tiles : static_cast<int>(threadIdx.x));
    const int i = tile / side * 4;
    const int j = tile % side * 4;
    const bool works = tile < tiles && share < shares && j >= i;
    double sums[4][4] = {};
    for (int64_t first = part * kGramRows; first < last; first += step) {
      const int count = static_cast<int>(min(step, last - first));
      __syncthreads();
      load_tile(problem, matrix, first, count, shared.tile);
      __syncthreads();
      for (int row = share; works && row < count; row += shares) {
        const float4 a = *reinterpret_cast<const float4*>(shared.tile + row * stride + i);
        const float4 b = *reinterpret_cast<const float4*>(shared.tile + row * stride + j);
        const double left[4] = {a.x, a.y, a.z, a.w};
        const double right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int y = 0; y < 4; ++y) {
#pragma unroll
          for (int x = 0; x < 4; ++x) sums[y][x] += left[y] * right[x];
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int entry = 0; entry < 16; ++entry)
      shared.sums[threadIdx.x * 16 + entry] = sums[entry / 4][entry % 4];
    __syncthreads();
    if (works && share == 0) {
      for (int entry = 0; entry < 16; ++entry) {
        double total = 0;
        for (int other = 0; other < shares; ++other) {
          total += shared.sums[(threadIdx.x + other * tiles) * 16 + entry];
        }
        gram[(i + entry / 4) * stride + j + entry % 4] = total;
      }
    }
  }
}

// One thread block per matrix: adds the parts in order, and leaves the inverse of the Cholesky factor in part
// 0.
__global__ __launch_bounds__(kThreads) void invert_kernel(Problem problem) {
  __shared__ double small[kSharedRank * kSharedRank];
  __shared__ double length[kMaxRank];
  __shared__ double pivot;
  const int64_t matrix = blockIdx.x;
  const double status = problem.status(matrix);
  __syncthreads();
  if (status == kApplyOnce && threadIdx.x == 0) problem.status(matrix) = kDone;  // by the last pass
  if (status != kApplyAgain) return;
  const int r = static_cast<int>(problem.columns);
  const int stride = static_cast<int>(problem.stride);
  double* factor = r <= kSharedRank ? small : problem.gram(matrix, problem.parts);
  double* inverse = problem.gram(matrix, 0);

  for (int entry = threadIdx.x; entry < stride * stride; entry += kThreads) {
    const int i = entry / stride;
    const int j = entry % stride;
    double sum = 0;
    if (i < r && j < r && j >= i) {
      for (int64_t part = 0; part < problem.parts; ++part) sum += problem.gram(matrix, part)[entry];
    }
    if (i < r && i == j) length[i] = sqrt(sum);
    factor[entry] = sum;
  }
  __syncthreads();
  bool good = true;
  for (int i = 0; i < r; ++i) good = good && length[i] > 0 && length[i] < INFINITY;
  if (!good) {  // the same in every thread
    if (threadIdx.x == 0) problem.status(matrix) = kFallback;
    return;
  }
  for (int entry = threadIdx.x; entry < stride * stride; entry += kThreads) {
    const int i = entry / stride;
    const int j = entry % stride;
    if (j < r && j >= i) factor[entry] /= length[i] * length[j];
  }
  for (int k = 0; k < r; ++k) {
    __syncthreads();
    if (threadIdx.x == 0) pivot = factor[k * stride + k];
    __syncthreads();
    if (!(pivot > kMinPivot)) {
      if (threadIdx.x == 0) problem.status(matrix) = kFallback;
      return;
    }
    const double root = 1.0 / sqrt(pivot);
    for (int j = k + threadIdx.x; j < r; j += kThreads) factor[k * stride + j] *= root;
    __syncthreads();
    const int rest = r - k - 1;
    for (int entry = threadIdx.x; entry < rest * rest; entry += kThreads) {
      const int i = k + 1 + entry / rest;
      const int j = k + 1 + entry % rest;
      if (j >= i) factor[i * stride + j] -= factor[k * stride + i] * factor[k * stride + j];
    }
  }
  __syncthreads();
  // Each thread solves R x = e_j for whole columns; x takes the place of the parts' sum, which nobody reads
  // any more.
  double norm = 0;
  for (int j = threadIdx.x; j < stride; j += kThreads) {
    for (int i = stride - 1; i >= 0; --i) {
      double value = 0;
      if (i <= j && j < r) {
        value = i == j ? 1.0 : 0.0;
        for (int k = i + 1; k <= j; ++k) value -= factor[i * stride + k] * inverse[k * stride + j];
        value /= factor[i * stride + i];
        norm += value * value;
      }
      inverse[i * stride + j] = value;
    }
  }
  norm = block_sum<kThreads>(norm);
  for (int entry = threadIdx.x; entry < r * stride; entry += kThreads)
    inverse[entry] /= length[entry / stride];
  if (threadIdx.x == 0) problem.status(matrix) = norm < kOnePass ? kApplyOnce : kApplyAgain;
}

// One thread block per part of a matrix: rows times the inverse, in place. A thread makes four columns of a
// row.
__global__ __launch_bounds__(kThreads) void apply_kernel(Problem problem) {
  __shared__ float tile[kTileFloats];
  const int64_t matrix = blockIdx.x / problem.parts;
  const int64_t part = blockIdx.x % problem.parts;
  const double status = problem.status(matrix);
  if (status != kApplyOnce && status != kApplyAgain) return;
  const int stride = static_cast<int>(problem.stride);
  const int side = stride / 4;
  const int64_t last = min(problem.rows, (part + 1) * kGramRows);
  const int64_t step = kTileFloats / stride;
  const double* inverse = problem.gram(matrix, 0);
  for (int64_t first = part * kGramRows; first < last; first += step) {
    const int count = static_cast<int>(min(step, last - first));
    __syncthreads();
    load_tile(problem, matrix, first, count, tile);
    __syncthreads();
    for (int item = threadIdx.x; item < count * side; item += kThreads) {
      const int row = item / side;
      const int j = item % side * 4;
      double sums[4] = {};
      for (int i = 0; i < j + 4; ++i) {
        const double value = tile[row * stride + i];
        const double2 low = *reinterpret_cast<const double2*>(inverse + i * stride + j);
        const double2 high = *reinterpret_cast<const double2*>(inverse + i * stride + j + 2);
        sums[0] += value * low.x;
        sums[1] += value * low.y;
        sums[2] += value * high.x;
        sums[3] += value * high.y;
      }
      float* target = problem.row(matrix, first + row);
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        if (j + x < problem.columns) target[j + x] = static_cast<float>(sums[x]);
      }
    }
  }
}

// One thread block per matrix that Cholesky-QR could not finish: Gram-Schmidt, every column made orthogonal
// twice.
__global__ __launch_bounds__(kThreads) void gram_schmidt_kernel(Problem problem) {
  __shared__ unsigned long long unit;
  const int64_t matrix = blockIdx.x;
  const double status = problem.status(matrix);
  if (status != kApplyAgain && status != kFallback) return;
  const int64_t rows = problem.rows;
  const int64_t columns = problem.columns;
  float* a = problem.row(matrix, 0);

  const auto norm_of = [&](int64_t column) {
    double sum = 0;
    for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
      const double value = a[row * columns + column];
      sum += value * value;
    }
    return sqrt(block_sum<kThreads>(sum));
  };
  // Takes from `column` what lies along the columns before it, and returns the norm of what remains, scaled
  // to 1.
  const auto project = [&](int64_t column) {
    for (int64_t k = 0; k < column; ++k) {
      double sum = 0;
      for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
        sum += static_cast<double>(a[row * columns + k]) * a[row * columns + column];
      }
      const double along = block_sum<kThreads>(sum);
      for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
        a[row * columns + column] =
            static_cast<float>(a[row * columns + column] - along * a[row * columns + k]);
      }
    }
    const double norm = norm_of(column);
    for (int64_t row = threadIdx.x; norm > 0 && row < rows; row += kThreads) {
      a[row * columns + column] = static_cast<float>(a[row * columns + column] / norm);
    }
    return norm;
  };

  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
      if (!is_finite(a[row * columns + column])) a[row * columns + column] = 0;
    }
    // Scaled to 1 first, so that float32 neither overflows nor underflows on the way.
    const double before = norm_of(column);
    for (int64_t row = threadIdx.x; before > 0 && row < rows; row += kThreads) {
      a[row * columns + column] = static_cast<float>(a[row * columns + column] / before);
    }
    const double kept = before > 0 ? project(column) : 0.0;
    if (kept > kDependent) {
      project(column);
      continue;
    }
    // The squares of what unit vectors keep outside the span sum up to rows - column: one keeps the mean.
    const double enough = 0.5 * static_cast<double>(rows - column) / static_cast<double>(rows);
    __syncthreads();
    if (threadIdx.x == 0) unit = static_cast<unsigned long long>(rows - 1);
    __syncthreads();
    for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
      double outside = 1;
      for (int64_t k = 0; k < column; ++k) {
        const double value = a[row * columns + k];
        outside -= value * value;
      }
      if (outside >= enough) {
        atomicMin(&unit, static_cast<unsigned long long>(row));
        break;
      }
    }
    __syncthreads();
    for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
      a[row * columns + column] = row == static_cast<int64_t>(unit) ? 1.0f : 0.0f;
    }
    project(column);
    project(column);
  }
}

}  // namespace

void orthogonalize(float* matrices, int64_t batch, int64_t rows, int64_t columns, double* workspace,
                   cudaStream_t stream) {
  if (batch == 0) return;
  const Problem problem{matrices, batch, rows, columns, padded_rank(columns), ceil_div(rows, kGramRows),
                        workspace};
  const auto matrix_grid = static_cast<unsigned>(batch);
  const auto part_grid = static_cast<unsigned>(batch * problem.parts);
  if (columns <= kThinRank && rows <= kThinRows) {
    orthogonalize_thin(matrices, batch, rows, columns,
                       workspace + batch * (problem.parts + 1) * problem.stride * problem.stride, stream);
    gram_schmidt_kernel<<<matrix_grid, kThreads, 0, stream>>>(problem);
    return;
  }
  start_kernel<<<static_cast<unsigned>(ceil_div(batch, kThreads)), kThreads, 0, stream>>>(problem);
  for (int pass = 0; pass < kMaxPasses; ++pass) {
    gram_kernel<<<part_grid, kThreads, 0, stream>>>(problem);
    invert_kernel<<<matrix_grid, kThreads, 0, stream>>>(problem);
    apply_kernel<<<part_grid, kThreads, 0, stream>>>(problem);
  }
  gram_schmidt_kernel<<<matrix_grid, kThreads, 0, stream>>>(problem);
}

}  // namespace dear::compress::cuda
