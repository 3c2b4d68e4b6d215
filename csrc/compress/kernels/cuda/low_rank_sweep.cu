#include <algorithm>
#include <climits>

#include "compress/kernels/cuda/low_rank.cuh"
#include "compress/kernels/cuda/low_rank_sweep.h"

namespace dear::compress::cuda {

namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kStripe = 32 * 4;        // columns that a warp has at once in rows_kernel: four of each lane
constexpr int kNarrow = 8 * 4;         // and in columns_kernel: there eight lanes share a row
constexpr int kRows = 2;               // rows that a lane has at once in columns_kernel
constexpr int kMostRank = 8;           // whose sums fit the registers
constexpr int kMostRankOfColumns = 4;  // where both factors are there, too

// Whether all groups of the matrix may be moved as one.
template <typename T>
__device__ __forceinline__ bool moves_groups(const BatchShape& batch, const float* error, const T* grad) {
  return batch.columns % 4 == 0 && vector_aligned(error) && vector_aligned(grad);
}

// Four elements of a row: of the memory of the error, and what is to be added to them; 0 where there is
// nothing.
struct Group {
  float kept[4];
  float added[4];

  template <bool kFast, typename T>
  __device__ __forceinline__ void load(const BatchShape& batch, const float* error, const T* grad, int row,
                                       int column) {
    const int n = row < batch.rows ? static_cast<int>(batch.columns) : 0;
    const int64_t begin = row * batch.columns;
    load_group<kFast>(error + begin, column, n, kept);
    load_group<kFast>(grad + begin, column, grad == nullptr ? 0 : n, added);
  }
  template <bool kFast>
  __device__ __forceinline__ void store(const BatchShape& batch, float* error, int row, int column) const {
    if (row < batch.rows) store_group<kFast>(kept, error + row * batch.columns, column, batch.columns);
  }
};

// See Note [Overflow in low-rank factors].
__device__ __forceinline__ float limited(float value, int& lost) {
  if (within(value, kLargestFactor)) return value;
  ++lost;
  return 0.0f;
}

// Rows that a lane has at once in rows_kernel: more would not fit the registers.
template <int kRank>
constexpr int kRowsAtOnce = kRank <= 4 ? 2 : 1;

// A stripe of a factor on its way to shared memory, in which all threads bring their part.
template <int kRank>
struct FactorStripe {
  static constexpr int kPitch = kStripe + 8;  // so that the 32 stores of a warp meet 32 banks
  static constexpr int kOwn = kRank * kStripe / kThreads;
  using Shared = float[kRank][kPitch];
  float own[kOwn];

  __device__ __forceinline__ void load(const float* factor, int64_t length, int64_t rank, int first) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int at = i * kThreads + threadIdx.x;
      own[i] = factor_at(factor, length, rank, first + at / kRank, at % kRank);
    }
  }
  __device__ __forceinline__ void store(Shared& to) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int at = i * kThreads + threadIdx.x;
      to[at % kRank][at / kRank] = own[i];
    }
  }
};

// What one thread block of a sweep works on.
template <typename T>
struct Place {
  const T* grad;
  float* error;
  const float* fixed;
  const float* held_p;  // null where nothing is pending
  const float* held_q;
};

template <typename T>
__device__ __forceinline__ Place<T> place_of(const BatchShape& batch, const Sweep& sweep, const T* grad,
                                             const float* fixed, int64_t fixed_length, int64_t matrix) {
  Place<T> place{grad, sweep.error + matrix * batch.numel(), fixed + matrix * fixed_length * batch.rank,
                 nullptr, nullptr};
  if (grad != nullptr) place.grad += start_of(sweep.starts, matrix, batch.numel(), sweep.numel);
  if (sweep.pending_p != nullptr) {
    place.held_p = sweep.pending_p + matrix * batch.rows * batch.rank;
    place.held_q = sweep.pending_q + matrix * batch.columns * batch.rank;
  }
  return place;
}

// P = C Q: a warp takes a row or two from the first column to the last. What comes next is on its way while a
// stripe is worked on, and the fixed factor alternates between two buffers, so one barrier a stripe is
// enough.
template <bool kFast, typename T, int kRank>
__device__ __forceinline__ int sweep_rows(const BatchShape& batch, const Place<T>& place, int row,
                                          typename FactorStripe<kRank>::Shared (&q)[2],
                                          typename FactorStripe<kRank>::Shared (&pending_q)[2],
                                          float* factor) {
  using Factor = FactorStripe<kRank>;
  constexpr int kRows = kRowsAtOnce<kRank>;
  const int lane = threadIdx.x % 32;
  const int columns = static_cast<int>(batch.columns);
  const bool pending = place.held_p != nullptr;
  float p[kRows][kRank] = {};
  if (pending) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int k = 0; k < kRank; ++k) p[i][k] = factor_at(place.held_p, batch.rows, batch.rank, row + i, k);
    }
  }
  Group next[kRows];
  Factor next_q;
  Factor next_pending_q;
  const auto fetch = [&](int stripe) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      next[i].template load<kFast>(batch, place.error, place.grad, row + i, stripe + lane * 4);
    next_q.load(place.fixed, columns, batch.rank, stripe);
    if (pending) next_pending_q.load(place.held_q, columns, batch.rank, stripe);
  };
  fetch(0);
  float sums[kRows][kRank] = {};
  int lost = 0;
  int buffer = 0;
  for (int stripe = 0; stripe < columns; stripe += kStripe) {
    next_q.store(q[buffer]);
    if (pending) next_pending_q.store(pending_q[buffer]);
    Group own[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) own[i] = next[i];
    __syncthreads();  // behind which nobody reads the other buffer any more
    fetch(stripe + kStripe);
    const int column = stripe + lane * 4;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float products[4] = {};
      if (pending) {
#pragma unroll
        for (int k = 0; k < kRank; ++k) {
          const float4 four = *reinterpret_cast<const float4*>(&pending_q[buffer][k][lane * 4]);
          products[0] += p[i][k] * four.x;
          products[1] += p[i][k] * four.y;
          products[2] += p[i][k] * four.z;
          products[3] += p[i][k] * four.w;
        }
        lost += take_out(products, column, columns, own[i].kept);
      }
      lost += correct_four(own[i].added, own[i].kept, own[i].kept, kLargestElement);
#pragma unroll
      for (int k = 0; k < kRank; ++k) {
        const float4 four = *reinterpret_cast<const float4*>(&q[buffer][k][lane * 4]);
        sums[i][k] += own[i].kept[0] * four.x;
        sums[i][k] += own[i].kept[1] * four.y;
        sums[i][k] += own[i].kept[2] * four.z;
        sums[i][k] += own[i].kept[3] * four.w;
      }
      own[i].template store<kFast>(batch, place.error, row + i, column);
    }
    buffer ^= 1;
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int k = 0; k < kRank; ++k) {
      float sum = sums[i][k];
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
      if (lane != 0 || row + i >= batch.rows || k >= batch.rank) continue;
      factor[(row + i) * batch.rank + k] = limited(sum, lost);
    }
  }
  return lost;
}

template <typename T, int kRank>
__global__ __launch_bounds__(kThreads, 2) void rows_kernel(BatchShape batch, Sweep sweep, const T* grad,
                                                           const float* fixed, float* factor) {
  __shared__ alignas(16) typename FactorStripe<kRank>::Shared q[2];
  __shared__ alignas(16) typename FactorStripe<kRank>::Shared pending_q[2];
  constexpr int kRows = kRowsAtOnce<kRank>;
  const int64_t blocks = ceil_div(batch.rows, kWarps * kRows);
  const int64_t matrix = blockIdx.x / blocks;
  const int row = static_cast<int>(blockIdx.x % blocks * kWarps + threadIdx.x / 32) * kRows;
  const Place<T> place = place_of(batch, sweep, grad, fixed, batch.columns, matrix);
  factor += matrix * batch.rows * batch.rank;
  const int lost = moves_groups(batch, place.error, place.grad)
                       ? sweep_rows<true, T, kRank>(batch, place, row, q, pending_q, factor)
                       : sweep_rows<false, T, kRank>(batch, place, row, q, pending_q, factor);
  if (lost != 0 && sweep.dropped != nullptr) atomicAdd(sweep.dropped, lost);
}

// Q = C^T P: a thread block takes a narrow stripe of columns from the first row to the last; eight lanes
// share a row, so a warp has four times kRows of them at once.
template <bool kFast, typename T, int kRank>
__device__ __forceinline__ int sweep_columns(const BatchShape& batch, const Place<T>& place, int stripe,
                                             float* factor) {
  __shared__ float parts[kWarps][kRank][kNarrow];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int column = stripe + lane % 8 * 4;
  const int rows = static_cast<int>(batch.rows);
  const bool pending = place.held_p != nullptr;
  const bool whole =
      batch.rank == kRank && kRank % 4 == 0 && vector_aligned(place.fixed) && vector_aligned(place.held_p);
  float q[4][kRank] = {};
  if (pending) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int k = 0; k < kRank; ++k)
        q[j][k] = factor_at(place.held_q, batch.columns, batch.rank, column + j, k);
    }
  }
  float sums[kRank][4] = {};
  int lost = 0;
  for (int first = warp * 4 + lane / 8; first < rows; first += kWarps * 4 * kRows) {
    Group own[kRows];
    float p[kRows][kRank];
    float f[kRows][kRank];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = first + i * kWarps * 4;
      own[i].template load<kFast>(batch, place.error, place.grad, row, column);
      factor_row<kRank>(place.fixed, rows, batch.rank, row, whole, f[i]);
      if (pending) factor_row<kRank>(place.held_p, rows, batch.rank, row, whole, p[i]);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (pending) {
        float products[4] = {};
#pragma unroll
        for (int k = 0; k < kRank; ++k) {
#pragma unroll
          for (int j = 0; j < 4; ++j) products[j] += p[i][k] * q[j][k];
        }
        lost += take_out(products, column, batch.columns, own[i].kept);
      }
      lost += correct_four(own[i].added, own[i].kept, own[i].kept, kLargestElement);
#pragma unroll
      for (int k = 0; k < kRank; ++k) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[k][j] += own[i].kept[j] * f[i][k];
      }
      own[i].template store<kFast>(batch, place.error, first + i * kWarps * 4, column);
    }
  }
#pragma unroll
  for (int k = 0; k < kRank; ++k) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float sum = sums[k][j];
      sum += __shfl_xor_sync(kAllLanes, sum, 8);
      sum += __shfl_xor_sync(kAllLanes, sum, 16);
      if (lane < 8) parts[warp][k][lane * 4 + j] = sum;
    }
  }
  __syncthreads();
  const int k = threadIdx.x / kNarrow;
  const int64_t own_column = stripe + threadIdx.x % kNarrow;
  if (k < kRank && k < batch.rank && own_column < batch.columns) {
    float sum = 0;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) sum += parts[other][k][threadIdx.x % kNarrow];
    factor[own_column * batch.rank + k] = limited(sum, lost);
  }
  return lost;
}

template <typename T, int kRank>
__global__ __launch_bounds__(kThreads, 2) void columns_kernel(BatchShape batch, Sweep sweep, const T* grad,
                                                              const float* fixed, float* factor) {
  static_assert(kRank * kNarrow <= kThreads, "each sum of a stripe has a thread that writes it");
  const int64_t stripes = ceil_div(batch.columns, kNarrow);
  const int64_t matrix = blockIdx.x / stripes;
  const int stripe = static_cast<int>(blockIdx.x % stripes) * kNarrow;
  const Place<T> place = place_of(batch, sweep, grad, fixed, batch.rows, matrix);
  factor += matrix * batch.columns * batch.rank;
  const int lost = moves_groups(batch, place.error, place.grad)
                       ? sweep_columns<true, T, kRank>(batch, place, stripe, factor)
                       : sweep_columns<false, T, kRank>(batch, place, stripe, factor);
  if (lost != 0 && sweep.dropped != nullptr) atomicAdd(sweep.dropped, lost);
}

int64_t blocks_of(const BatchShape& batch, bool transposed) {
  if (transposed) return batch.count * ceil_div(batch.columns, kNarrow);
  return batch.count *
         ceil_div(batch.rows, kWarps * (batch.rank <= 4 ? kRowsAtOnce<4> : kRowsAtOnce<kMostRank>));
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
  if (std::max(batch.rows, batch.columns) > INT_MAX - kThreads) return false;  // places in a matrix are ints
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
