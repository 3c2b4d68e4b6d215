#include "compress/kernels/cuda/low_rank.cuh"
#include "compress/kernels/cuda/low_rank_sweep.h"

namespace dear::compress::cuda {

namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kStripe = 32 * 4;        // columns that a warp has at once: four of each lane
constexpr int kRows = 2;               // rows that a warp has at once: more would not fit the registers
constexpr int kMostRank = 8;           // whose sums fit the registers
constexpr int kMostRankOfColumns = 4;  // where the fixed factor is not in shared memory

// Four elements of kRows rows of a matrix, in registers: loaded, corrected and stored.
template <typename T>
struct OwnRows {
  float kept[kRows][4];

  // Of the memory of the error, and what is to be added to it; 0 where there is nothing.
  __device__ __forceinline__ void load(const BatchShape& batch, const float* error, const T* grad,
                                       int64_t row, int64_t column, float (&added)[kRows][4]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t n = row + i < batch.rows ? batch.columns : 0;
      const float* from = error + (row + i) * batch.columns;
      const T* own = grad + (row + i) * batch.columns;
      load_four(from, column, n, vector_aligned(from), kept[i]);
      load_four(own, column, grad == nullptr ? 0 : n, vector_aligned(own), added[i]);
    }
  }
  __device__ __forceinline__ void store(const BatchShape& batch, float* error, int64_t row,
                                        int64_t column) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row + i >= batch.rows) break;
      float* to = error + (row + i) * batch.columns;
      store_four(kept[i], to, column, batch.columns, vector_aligned(to));
    }
  }
};

// An element of a factor [length, rank]; 0 outside it.
__device__ __forceinline__ float factor_at(const float* factor, int64_t length, int64_t rank, int64_t index,
                                           int64_t k) {
  return index < length && k < rank ? factor[index * rank + k] : 0.0f;
}

// See Note [Overflow in low-rank factors].
__device__ __forceinline__ float limited(float value, int& lost) {
  if (within(value, kLargestFactor)) return value;
  ++lost;
  return 0.0f;
}

// P = C Q: a warp takes kRows rows from the first column to the last.
template <typename T, int kRank>
__global__ __launch_bounds__(kThreads, 2) void rows_kernel(BatchShape batch, Sweep sweep, const T* grad,
                                                           const float* fixed, float* factor) {
  __shared__ float q[kRank][kStripe];
  __shared__ float pending_q[kRank][kStripe];
  const int64_t blocks = ceil_div(batch.rows, kWarps * kRows);
  const int64_t matrix = blockIdx.x / blocks;
  const int64_t row = (blockIdx.x % blocks * kWarps + threadIdx.x / 32) * kRows;
  const int lane = threadIdx.x % 32;
  const bool pending = sweep.pending_p != nullptr;
  const T* own = grad;
  if (grad != nullptr) own += start_of(sweep.starts, matrix, batch.numel(), sweep.numel);
  float* error = sweep.error + matrix * batch.numel();
  fixed += matrix * batch.columns * batch.rank;
  const float* held_q = pending ? sweep.pending_q + matrix * batch.columns * batch.rank : nullptr;
  float p[kRows][kRank] = {};
  if (pending) {
    const float* held_p = sweep.pending_p + matrix * batch.rows * batch.rank;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int k = 0; k < kRank; ++k) p[i][k] = factor_at(held_p, batch.rows, batch.rank, row + i, k);
    }
  }
  float sums[kRows][kRank] = {};
  int lost = 0;
  for (int64_t stripe = 0; stripe < batch.columns; stripe += kStripe) {
    __syncthreads();  // the readers of the previous stripe are done
    for (int i = threadIdx.x; i < kRank * kStripe; i += kThreads) {
      const int64_t column = stripe + i / kRank;
      q[i % kRank][i / kRank] = factor_at(fixed, batch.columns, batch.rank, column, i % kRank);
      if (pending) {
        pending_q[i % kRank][i / kRank] = factor_at(held_q, batch.columns, batch.rank, column, i % kRank);
      }
    }
    __syncthreads();
    const int64_t column = stripe + lane * 4;
    OwnRows<T> own_rows;
    float added[kRows][4];
    own_rows.load(batch, error, own, row, column, added);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float products[4] = {};
      if (pending) {
#pragma unroll
        for (int k = 0; k < kRank; ++k) {
#pragma unroll
          for (int j = 0; j < 4; ++j) products[j] += p[i][k] * pending_q[k][lane * 4 + j];
        }
        lost += take_out(products, column, batch.columns, own_rows.kept[i]);
      }
      lost += correct_four(added[i], own_rows.kept[i], own_rows.kept[i], kLargestElement);
#pragma unroll
      for (int k = 0; k < kRank; ++k) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][k] += own_rows.kept[i][j] * q[k][lane * 4 + j];
      }
    }
    own_rows.store(batch, error, row, column);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int k = 0; k < kRank; ++k) {
      float sum = sums[i][k];
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
      if (lane != 0 || row + i >= batch.rows || k >= batch.rank) continue;
      factor[(matrix * batch.rows + row + i) * batch.rank + k] = limited(sum, lost);
    }
  }
  if (lost != 0 && sweep.dropped != nullptr) atomicAdd(sweep.dropped, lost);
}

// Q = C^T P: a thread block takes a stripe of columns from the first row to the last.
template <typename T, int kRank>
__global__ __launch_bounds__(kThreads, 2) void columns_kernel(BatchShape batch, Sweep sweep, const T* grad,
                                                              const float* fixed, float* factor) {
  __shared__ float parts[kWarps / 2][kRank][kStripe];
  __shared__ float q[kRank][kStripe];
  const int64_t stripes = ceil_div(batch.columns, kStripe);
  const int64_t matrix = blockIdx.x / stripes;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t stripe = blockIdx.x % stripes * kStripe;
  const int64_t column = stripe + lane * 4;
  const bool pending = sweep.pending_p != nullptr;
  const T* own = grad;
  if (grad != nullptr) own += start_of(sweep.starts, matrix, batch.numel(), sweep.numel);
  float* error = sweep.error + matrix * batch.numel();
  fixed += matrix * batch.rows * batch.rank;
  const float* held_p = pending ? sweep.pending_p + matrix * batch.rows * batch.rank : nullptr;
  if (pending) {
    const float* held_q = sweep.pending_q + matrix * batch.columns * batch.rank;
    for (int i = threadIdx.x; i < kRank * kStripe; i += kThreads) {
      q[i % kRank][i / kRank] = factor_at(held_q, batch.columns, batch.rank, stripe + i / kRank, i % kRank);
    }
    __syncthreads();
  }
  float sums[kRank][4] = {};
  int lost = 0;
  for (int64_t row = warp * kRows; row < batch.rows; row += kWarps * kRows) {
    OwnRows<T> own_rows;
    float added[kRows][4];
    own_rows.load(batch, error, own, row, column, added);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (pending) {
        float products[4] = {};
#pragma unroll
        for (int k = 0; k < kRank; ++k) {
          const float p = factor_at(held_p, batch.rows, batch.rank, row + i, k);  // the same in every lane
#pragma unroll
          for (int j = 0; j < 4; ++j) products[j] += p * q[k][lane * 4 + j];
        }
        lost += take_out(products, column, batch.columns, own_rows.kept[i]);
      }
      lost += correct_four(added[i], own_rows.kept[i], own_rows.kept[i], kLargestElement);
#pragma unroll
      for (int k = 0; k < kRank; ++k) {
        const float f = factor_at(fixed, batch.rows, batch.rank, row + i, k);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[k][j] += own_rows.kept[i][j] * f;
      }
    }
    own_rows.store(batch, error, row, column);
  }
  // Half of the warps hand their sums to the other half, until one has all.
  for (int half = kWarps / 2; half > 0; half /= 2) {
    __syncthreads();
    if (warp >= half && warp < 2 * half) {
#pragma unroll
      for (int k = 0; k < kRank; ++k) {
#pragma unroll
        for (int j = 0; j < 4; ++j) parts[warp - half][k][lane * 4 + j] = sums[k][j];
      }
    }
    __syncthreads();
    if (warp < half) {
#pragma unroll
      for (int k = 0; k < kRank; ++k) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[k][j] += parts[warp][k][lane * 4 + j];
      }
    }
  }
  if (warp == 0) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int k = 0; k < kRank; ++k) {
        if (column + j >= batch.columns || k >= batch.rank) continue;
        factor[(matrix * batch.columns + column + j) * batch.rank + k] = limited(sums[k][j], lost);
      }
    }
  }
  if (lost != 0 && sweep.dropped != nullptr) atomicAdd(sweep.dropped, lost);
}

int64_t blocks_of(const BatchShape& batch, bool transposed) {
  return batch.count * (transposed ? ceil_div(batch.columns, kStripe) : ceil_div(batch.rows, kWarps * kRows));
}

template <int kRank, bool kTransposed>
void launch(const BatchShape& batch, const Sweep& sweep, const float* fixed, float* factor,
            cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(blocks_of(batch, kTransposed));
  dispatch(sweep.type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* grad = static_cast<const T*>(sweep.grad);
    if constexpr (kTransposed) {
      columns_kernel<T, kRank><<<grid, kThreads, 0, stream>>>(batch, sweep, grad, fixed, factor);
    } else {
      rows_kernel<T, kRank><<<grid, kThreads, 0, stream>>>(batch, sweep, grad, fixed, factor);
    }
  });
}

}  // namespace

bool sweeps_at_once(const BatchShape& batch, bool transposed) {
  if (batch.rank > (transposed ? kMostRankOfColumns : kMostRank) || batch.numel() == 0) return false;
  int device = 0;
  int processors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return false;
  }
  return blocks_of(batch, transposed) >= processors;
}

void low_rank_sweep(const BatchShape& batch, const Sweep& sweep, const float* fixed, float* factor,
                    bool transposed, cudaStream_t stream) {
  if (blocks_of(batch, transposed) == 0) return;
  if (transposed) {
    launch<kMostRankOfColumns, true>(batch, sweep, fixed, factor, stream);
  } else if (batch.rank <= 4) {
    launch<4, false>(batch, sweep, fixed, factor, stream);
  } else {
    launch<kMostRank, false>(batch, sweep, fixed, factor, stream);
  }
}

}  // namespace dear::compress::cuda
