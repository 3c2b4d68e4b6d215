// What the kernels of the low-rank family share.
#pragma once

#include "compress/kernels/cuda/common.cuh"
#include "compress/kernels/cuda/low_rank.h"

namespace dear::compress::cuda {

__device__ __forceinline__ int64_t start_of(const int64_t* starts, int64_t matrix, int64_t matrix_numel,
                                            int64_t numel) {
  const int64_t start = starts[matrix];
  if (start < 0 || start > numel - matrix_numel) __trap();
  return start;
}

// kept -= products, where that is finite; returns where it is not. Behind the last column an infinite P times
// a Q of zero is not finite either, and nobody's.
__device__ __forceinline__ int take_out(const float (&products)[4], int64_t column, int64_t columns,
                                        float (&kept)[4]) {
  int lost = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float rest = kept[j] - products[j];
    const bool finite = is_finite(rest);
    kept[j] = finite ? rest : kept[j];
    lost += finite || column + j >= columns ? 0 : 1;
  }
  return lost;
}

}  // namespace dear::compress::cuda
