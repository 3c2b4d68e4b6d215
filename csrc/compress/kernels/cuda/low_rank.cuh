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

// Note [Loads without branches]
// A load that stands behind a branch waits for whatever decides it, and loads that wait in turn leave the
// memory idle. So a kernel asks once, for all of its matrix, whether groups of four may be moved as one
// (kFast), and then only whether a group exists, which is a predicate of the load.

// Elements [offset, offset + 4) of which those before n exist; the others read as 0. With kFast n is a
// multiple of 4.
template <bool kFast, typename T>
__device__ __forceinline__ void load_group(const T* base, int offset, int n, float (&out)[4]) {
  if constexpr (kFast) {
    Four<T> four{};
    if (offset < n) four = *reinterpret_cast<const Four<T>*>(base + offset);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = to_float(four.values[i]);
  } else {
    load_four(base, offset, n, false, out);
  }
}

template <bool kFast, typename T>
__device__ __forceinline__ void store_group(const float (&in)[4], T* base, int offset, int n) {
  if constexpr (kFast) {
    Four<T> four;
#pragma unroll
    for (int i = 0; i < 4; ++i) from_float(in[i], &four.values[i]);
    if (offset < n) *reinterpret_cast<Four<T>*>(base + offset) = four;
  } else {
    store_four(in, base, offset, n, false);
  }
}

// An element of a factor [length, rank]; 0 outside it.
__device__ __forceinline__ float factor_at(const float* factor, int64_t length, int64_t rank, int64_t index,
                                           int64_t k) {
  return index < length && k < rank ? factor[index * rank + k] : 0.0f;
}

// A row of it. `whole`: its length is kRank, and rows may be moved four elements at once.
template <int kRank>
__device__ __forceinline__ void factor_row(const float* factor, int64_t length, int64_t rank, int64_t index,
                                           bool whole, float (&out)[kRank]) {
  if (whole) {
#pragma unroll
    for (int k = 0; k < kRank; k += 4) {
      float4 four{};
      if (index < length) four = *reinterpret_cast<const float4*>(factor + index * kRank + k);
      out[k] = four.x;
      out[k + 1] = four.y;
      out[k + 2] = four.z;
      out[k + 3] = four.w;
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kRank; ++k) out[k] = factor_at(factor, length, rank, index, k);
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
