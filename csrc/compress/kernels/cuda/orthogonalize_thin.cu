#include "compress/kernels/cuda/low_rank.cuh"
#include "compress/kernels/cuda/orthogonalize.cuh"

namespace dear::compress::cuda {

namespace {

// What the sums of a thread leave of the registers.
template <int kRank>
constexpr int kThinThreads = kRank <= 4 ? 512 : 256;

// The inverse of the Cholesky factor of a Gram matrix, scaled as in invert_kernel, and what is to be done
// with it; by one thread. `gram`: its upper triangle for kRank columns, row by row. Behind the last column
// the inverse is zero.
template <int kRank>
__device__ double invert_thin(const double* gram, int rank, double (&inverse)[kRank][kRank]) {
  double factor[kRank][kRank];
  double length[kRank];
  int entry = 0;
#pragma unroll
  for (int i = 0; i < kRank; ++i) {
#pragma unroll
    for (int j = i; j < kRank; ++j) factor[i][j] = gram[entry++];
    length[i] = i < rank ? sqrt(factor[i][i]) : 1.0;
    if (!(length[i] > 0 && length[i] < INFINITY)) return kFallback;
  }
#pragma unroll
  for (int i = 0; i < kRank; ++i) {
#pragma unroll
    for (int j = i; j < kRank; ++j) factor[i][j] /= length[i] * length[j];
    if (i >= rank) factor[i][i] = 1.0;  // as if the columns that are not there were orthogonal
  }
#pragma unroll
  for (int k = 0; k < kRank; ++k) {
    if (!(factor[k][k] > kMinPivot)) return kFallback;
    const double root = 1.0 / sqrt(factor[k][k]);
#pragma unroll
    for (int j = k; j < kRank; ++j) factor[k][j] *= root;
#pragma unroll
    for (int i = k + 1; i < kRank; ++i) {
#pragma unroll
      for (int j = i; j < kRank; ++j) factor[i][j] -= factor[k][i] * factor[k][j];
    }
  }
  double norm = 0;
#pragma unroll
  for (int j = 0; j < kRank; ++j) {
    double column[kRank];
#pragma unroll
    for (int i = kRank - 1; i >= 0; --i) {
      double value = i == j ? 1.0 : 0.0;
#pragma unroll
      for (int k = i + 1; k < kRank; ++k) {
        if (k <= j) value -= factor[i][k] * column[k];
      }
      column[i] = i <= j ? value / factor[i][i] : 0.0;
      const bool counts = j < rank && i <= j;
      if (counts) norm += column[i] * column[i];
      inverse[i][j] = counts ? column[i] / length[i] : 0.0;
    }
  }
  return norm < kOnePass ? kApplyOnce : kApplyAgain;
}

// One thread block per matrix of few columns, which does all of Cholesky-QR by itself: every step of it is so
// short that launches would take longer. Leaves kFallback where Gram-Schmidt must finish.
template <int kRank>
__global__ __launch_bounds__(kThinThreads<kRank>, 1) void thin_kernel(float* matrices, int rows, int rank,
                                                                      double* status) {
  constexpr int kThreadsHere = kThinThreads<kRank>;
  constexpr int kEntries = kRank * (kRank + 1) / 2;  // of the upper triangle, row by row
  __shared__ double partial[kThreadsHere / 32][kEntries];
  __shared__ double inverse[kRank][kRank];
  __shared__ double left;  // to do
  float* a = matrices + static_cast<int64_t>(blockIdx.x) * rows * rank;
  const bool whole = rank == kRank && vector_aligned(a);
  for (int pass = 0; pass < kMaxPasses; ++pass) {
    double sums[kEntries] = {};
    for (int row = threadIdx.x; row < rows; row += kThreadsHere) {
      float values[kRank];
      factor_row<kRank>(a, rows, rank, row, whole, values);
      int entry = 0;
#pragma unroll
      for (int i = 0; i < kRank; ++i) {
#pragma unroll
        for (int j = i; j < kRank; ++j) sums[entry++] += static_cast<double>(values[i]) * values[j];
      }
    }
#pragma unroll
    for (int entry = 0; entry < kEntries; ++entry) {
      double sum = sums[entry];
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
      if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32][entry] = sum;
    }
    __syncthreads();
    if (threadIdx.x < kEntries) {
      double total = partial[0][threadIdx.x];
      for (int warp = 1; warp < kThreadsHere / 32; ++warp) total += partial[warp][threadIdx.x];
      partial[0][threadIdx.x] = total;
    }
    __syncthreads();
    if (threadIdx.x == 0) left = invert_thin<kRank>(partial[0], rank, inverse);
    __syncthreads();
    if (left == kFallback) break;
    for (int row = threadIdx.x; row < rows; row += kThreadsHere) {
      float values[kRank];
      factor_row<kRank>(a, rows, rank, row, whole, values);
#pragma unroll
      for (int j = 0; j < kRank; ++j) {
        double sum = 0;
#pragma unroll
        for (int i = 0; i <= j; ++i) sum += values[i] * inverse[i][j];
        if (j < rank) a[row * rank + j] = static_cast<float>(sum);
      }
    }
    if (left == kApplyOnce) break;
    __syncthreads();  // rows and sums are read again
  }
  if (threadIdx.x == 0) status[blockIdx.x] = left == kApplyOnce ? kDone : left;
}

}  // namespace

void orthogonalize_thin(float* matrices, int64_t batch, int64_t rows, int64_t columns, double* status,
                        cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(batch);
  const int length = static_cast<int>(rows);
  const int rank = static_cast<int>(columns);
  if (rank <= 4) {
    thin_kernel<4><<<grid, kThinThreads<4>, 0, stream>>>(matrices, length, rank, status);
  } else {
    thin_kernel<kThinRank><<<grid, kThinThreads<kThinRank>, 0, stream>>>(matrices, length, rank, status);
  }
}

}  // namespace dear::compress::cuda
