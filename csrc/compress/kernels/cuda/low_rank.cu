#include <algorithm>
#include <climits>

#include "compress/kernels/cuda/low_rank.cuh"
#include "compress/kernels/cuda/low_rank.h"

namespace dear::compress::cuda {

namespace {

// A thread block makes a tile of kTileRows * kTileColumns elements of P Q^T: each warp four rows, each thread
// four columns of them. Factors pass through shared memory, kTileRank columns at a time.
constexpr int kTileRows = kThreads / 32 * 4;
constexpr int kTileColumns = 32 * 4;
constexpr int kTileRank = 8;

// Up to this rank a thread has its rows of Q in registers.
constexpr int kThinRank = 8;
constexpr int kWarps = kThreads / 32;
constexpr int kDecodeRows = 16;  // of a warp
constexpr int kMostAcross = 4;   // warps side by side

// See Note [Overflow in low-rank factors].
__global__ __launch_bounds__(kThreads) void limit_kernel(float* factor, int64_t n, int32_t* dropped) {
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kBlock;
  const bool aligned = vector_aligned(factor);
  int lost = 0;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int64_t offset = start + group_offset(group);
    float values[4];
    load_four(factor, offset, n, aligned, values);
    int own = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (within(values[i], kLargestFactor)) continue;
      values[i] = 0.0f;
      ++own;
    }
    if (own != 0) store_four(values, factor, offset, n, aligned);
    lost += own;
  }
  if (lost != 0 && dropped != nullptr) atomicAdd(dropped, lost);
}

// Which tile a thread block has.
struct Tile {
  int64_t matrix;
  int64_t row;
  int64_t column;

  __device__ explicit Tile(const BatchShape& batch) {
    const int64_t across = ceil_div(batch.columns, kTileColumns);
    const int64_t tiles = across * ceil_div(batch.rows, kTileRows);
    matrix = blockIdx.x / tiles;
    row = blockIdx.x % tiles / across * kTileRows;
    column = blockIdx.x % across * kTileColumns;
  }
  // The first of the thread's four rows and four columns.
  __device__ int64_t own_row() const { return row + threadIdx.x / 32 * 4; }
  __device__ int64_t own_column() const { return column + threadIdx.x % 32 * 4; }
};

// The thread's part of the tile of P Q^T. The sum over the rank runs in order. All threads must call it.
__device__ __forceinline__ void multiply(const BatchShape& batch, const Tile& tile, const float* p,
                                         const float* q, float (&sums)[4][4]) {
  __shared__ float rows[kTileRank][kTileRows];
  __shared__ float columns[kTileRank][kTileColumns];
  p += tile.matrix * batch.rows * batch.rank;
  q += tile.matrix * batch.columns * batch.rank;
  for (int64_t base = 0; base < batch.rank; base += kTileRank) {
    __syncthreads();  // the readers of the previous round are done
    for (int i = threadIdx.x; i < kTileRank * kTileRows; i += kThreads) {
      const int64_t row = tile.row + i / kTileRank;
      const int64_t k = base + i % kTileRank;
      rows[i % kTileRank][i / kTileRank] =
          row < batch.rows && k < batch.rank ? p[row * batch.rank + k] : 0.0f;
    }
    for (int i = threadIdx.x; i < kTileRank * kTileColumns; i += kThreads) {
      const int64_t column = tile.column + i / kTileRank;
      const int64_t k = base + i % kTileRank;
      columns[i % kTileRank][i / kTileRank] =
          column < batch.columns && k < batch.rank ? q[column * batch.rank + k] : 0.0f;
    }
    __syncthreads();
    const int depth = static_cast<int>(min(static_cast<int64_t>(kTileRank), batch.rank - base));
    for (int k = 0; k < depth; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[i][j] += rows[k][threadIdx.x / 32 * 4 + i] * columns[k][threadIdx.x % 32 * 4 + j];
        }
      }
    }
  }
}

template <typename T>
__global__ __launch_bounds__(kThreads) void correct_kernel(BatchShape batch, Sweep sweep, const T* grad) {
  const Tile tile(batch);
  float sums[4][4] = {};
  if (sweep.pending_p != nullptr) multiply(batch, tile, sweep.pending_p, sweep.pending_q, sums);
  const T* own = grad;
  if (grad != nullptr) own += start_of(sweep.starts, tile.matrix, batch.numel(), sweep.numel);
  int lost = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (tile.own_row() + i >= batch.rows) break;
    const int64_t offset = (tile.own_row() + i) * batch.columns;
    float* row = sweep.error + tile.matrix * batch.numel() + offset;
    const bool aligned = vector_aligned(row);
    float kept[4];
    float values[4] = {};
    load_four(row, tile.own_column(), batch.columns, aligned, kept);
    if (own != nullptr) {
      load_four(own + offset, tile.own_column(), batch.columns, vector_aligned(own + offset), values);
    }
    lost += take_out(sums[i], tile.own_column(), batch.columns, kept);
    lost += correct_four(values, kept, kept, kLargestElement);
    store_four(kept, row, tile.own_column(), batch.columns, aligned);
  }
  if (lost != 0 && sweep.dropped != nullptr) atomicAdd(sweep.dropped, lost);
}

__global__ __launch_bounds__(kThreads) void subtract_kernel(BatchShape batch, const float* p, const float* q,
                                                            float* error, int32_t* dropped) {
  const Tile tile(batch);
  float sums[4][4] = {};
  multiply(batch, tile, p, q, sums);
  int lost = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (tile.own_row() + i >= batch.rows) break;
    float* row = error + tile.matrix * batch.numel() + (tile.own_row() + i) * batch.columns;
    const bool aligned = vector_aligned(row);
    float kept[4];
    load_four(row, tile.own_column(), batch.columns, aligned, kept);
    lost += take_out(sums[i], tile.own_column(), batch.columns, kept);
    store_four(kept, row, tile.own_column(), batch.columns, aligned);
  }
  if (lost != 0 && dropped != nullptr) atomicAdd(dropped, lost);
}

// How a thread block lies on a matrix whose factors have few columns: `across` warps side by side, each on
// kTileColumns columns and on kDecodeRows rows, which are kWarps / across apart.
struct Cover {
  int across;

  __host__ __device__ int width() const { return across * kTileColumns; }
  __host__ __device__ int height() const { return kWarps / across * kDecodeRows; }
};

// A warp's rows of P Q^T, from its rows of P and each thread's four rows of Q.
template <bool kFast, int kRank, typename T>
__device__ __forceinline__ void decode_rows(const BatchShape& batch, const float (*left)[kRank],
                                            const float (&right)[kRank][4], T* matrix, int first, int column,
                                            int apart) {
  const int columns = static_cast<int>(batch.columns);
  const int rows = static_cast<int>(batch.rows);
#pragma unroll 4
  for (int i = 0; i < kDecodeRows; ++i) {
    const int row = first + i * apart;
    float sums[4] = {};
#pragma unroll
    for (int k = 0; k < kRank; ++k) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[j] += left[i * apart][k] * right[k][j];
    }
    T* to = matrix + row * batch.columns;
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[j] = held(sums[j], to);
    store_group<kFast>(sums, to, column, row < rows ? columns : 0);
  }
}

// All of both factors that a thread block needs is there before it writes, and then nothing holds it up.
template <typename T, int kRank>
__global__ __launch_bounds__(kThreads) void thin_decode_kernel(BatchShape batch, Cover cover, const float* p,
                                                               const float* q, const int64_t* starts, T* out,
                                                               int64_t numel) {
  __shared__ alignas(16) float left[kWarps * kDecodeRows][kRank];
  __shared__ alignas(16) float right[kRank][kMostAcross * kTileColumns];
  const int64_t across = ceil_div(batch.columns, int64_t{cover.width()});
  const int64_t tiles = across * ceil_div(batch.rows, int64_t{cover.height()});
  const int64_t matrix = blockIdx.x / tiles;
  const int tile = static_cast<int>(blockIdx.x % tiles);
  const int top = static_cast<int>(tile / across) * cover.height();
  const int begin = static_cast<int>(tile % across) * cover.width();
  p += matrix * batch.rows * batch.rank;
  q += matrix * batch.columns * batch.rank;
  const bool whole = batch.rank == kRank && vector_aligned(p) && vector_aligned(q);
  float values[kRank];
  for (int i = threadIdx.x; i < cover.width(); i += kThreads) {
    factor_row<kRank>(q, batch.columns, batch.rank, begin + i, whole, values);
#pragma unroll
    for (int k = 0; k < kRank; ++k) right[k][i] = values[k];
  }
  for (int i = threadIdx.x; i < cover.height(); i += kThreads) {
    factor_row<kRank>(p, batch.rows, batch.rank, top + i, whole, values);
#pragma unroll
    for (int k = 0; k < kRank; ++k) left[i][k] = values[k];
  }
  __syncthreads();
  const int warp = threadIdx.x / 32;
  const int row = warp / cover.across;
  const int column = warp % cover.across * kTileColumns + threadIdx.x % 32 * 4;
  float factors[kRank][4];
#pragma unroll
  for (int k = 0; k < kRank; ++k) load_group<true>(right[k], column, kMostAcross * kTileColumns, factors[k]);
  T* own = out + start_of(starts, matrix, batch.numel(), numel);
  const int apart = kWarps / cover.across;
  if (batch.columns % 4 == 0 && vector_aligned(own)) {
    decode_rows<true, kRank>(batch, left + row, factors, own, top + row, begin + column, apart);
  } else {
    decode_rows<false, kRank>(batch, left + row, factors, own, top + row, begin + column, apart);
  }
}

template <typename T>
__global__ __launch_bounds__(kThreads) void decode_kernel(BatchShape batch, const float* p, const float* q,
                                                          const int64_t* starts, T* out, int64_t numel) {
  const Tile tile(batch);
  float sums[4][4] = {};
  multiply(batch, tile, p, q, sums);
  T* matrix = out + start_of(starts, tile.matrix, batch.numel(), numel);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (tile.own_row() + i >= batch.rows) break;
    T* row = matrix + (tile.own_row() + i) * batch.columns;
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[i][j] = held(sums[i][j], row);
    store_four(sums[i], row, tile.own_column(), batch.columns, vector_aligned(row));
  }
}

unsigned tile_count(const BatchShape& batch) {
  return static_cast<unsigned>(batch.count * ceil_div(batch.rows, kTileRows) *
                               ceil_div(batch.columns, kTileColumns));
}

// Rows are written as far along as they go: memory likes what lies together.
Cover cover_of(const BatchShape& batch) {
  int across = 1;
  while (across < kMostAcross && across * kTileColumns < batch.columns) across *= 2;
  return {across};
}

}  // namespace

void correct_matrices(const BatchShape& batch, const Sweep& sweep, cudaStream_t stream) {
  if (tile_count(batch) == 0) return;
  dispatch(sweep.type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    correct_kernel<T>
        <<<tile_count(batch), kThreads, 0, stream>>>(batch, sweep, static_cast<const T*>(sweep.grad));
  });
}

void limit_factor(float* factor, int64_t n, int32_t* dropped, cudaStream_t stream) {
  if (n == 0) return;
  limit_kernel<<<static_cast<unsigned>(block_count(n)), kThreads, 0, stream>>>(factor, n, dropped);
}

void low_rank_subtract(const BatchShape& batch, const float* p, const float* q, float* error,
                       int32_t* dropped, cudaStream_t stream) {
  if (tile_count(batch) == 0) return;
  subtract_kernel<<<tile_count(batch), kThreads, 0, stream>>>(batch, p, q, error, dropped);
}

void low_rank_decode(const BatchShape& batch, const float* p, const float* q, const int64_t* starts,
                     GradType type, void* out, int64_t numel, cudaStream_t stream) {
  if (tile_count(batch) == 0) return;
  dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    T* target = static_cast<T*>(out);
    if (batch.rank > kThinRank || std::max(batch.rows, batch.columns) > INT_MAX - kThreads) {
      decode_kernel<T><<<tile_count(batch), kThreads, 0, stream>>>(batch, p, q, starts, target, numel);
      return;
    }
    const Cover cover = cover_of(batch);
    const auto grid = static_cast<unsigned>(batch.count * ceil_div(batch.rows, int64_t{cover.height()}) *
                                            ceil_div(batch.columns, int64_t{cover.width()}));
    if (batch.rank <= 4) {
      thin_decode_kernel<T, 4><<<grid, kThreads, 0, stream>>>(batch, cover, p, q, starts, target, numel);
    } else {
      thin_decode_kernel<T, kThinRank>
          <<<grid, kThreads, 0, stream>>>(batch, cover, p, q, starts, target, numel);
    }
  });
}

}  // namespace dear::compress::cuda
