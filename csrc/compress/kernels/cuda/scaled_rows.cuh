// The kernels of formats with a scale for each block of elements. A format has
//   largest           the largest element that it takes in,
//   quantize(...)     rounds four values of a warp's block, at `offset` of the row, and leaves in them what
//                     that lost; all lanes call it, and those behind `n`, the elements of the row, bring
//                     zeros; `index`: the element's place in the whole, by which is drawn,
//   load(...)         what four codes of a row say, times a power of two,
//   scales(...)       of four elements, by which they are divided before they are rounded; all lanes call it,
//   learn(...)        takes in four decoded elements.
#pragma once

#include "compress/kernels/cuda/common.cuh"
#include "compress/kernels/scaled_rows.h"

namespace dear::compress::cuda {

// Of a format that has none but those of blocks.
struct NoScales {
  __device__ __forceinline__ void divide(float (&)[4]) const {}
  __device__ __forceinline__ void multiply(float (&)[4]) const {}
};

// Adds the error, where there is one, to values that are divided by the scales, rounds, and stores what that
// lost; returns how many were dropped.
template <typename Format, typename Scales>
__device__ __forceinline__ int correct_and_quantize(const Format& format, const Scales& scales,
                                                    const float (&values)[4], float* error, bool aligned,
                                                    int64_t offset, int64_t n, uint32_t index, int32_t* row,
                                                    int64_t shard) {
  float kept[4] = {};
  if (error != nullptr) load_four(error, offset, n, aligned, kept);
  scales.divide(kept);
  const int lost = correct_four(values, kept, kept, Format::largest);
  format.quantize(kept, offset, n, index, row, shard);
  scales.multiply(kept);
  if (error != nullptr) store_four(kept, error, offset, n, aligned);
  return lost;
}

// One block of one row: the grid is [rows, blocks of a row].
template <typename T, typename Format>
__global__ __launch_bounds__(kThreads) void encode_kernel(const T* grad, float* error, int64_t n, Rows rows,
                                                          Format format, int32_t* payload, int32_t* dropped) {
  const int64_t begin = blockIdx.y * rows.shard;
  const int64_t own = min(rows.shard, n - begin);
  const T* values_of_row = grad + begin;
  float* error_of_row = error == nullptr ? nullptr : error + begin;
  int32_t* row = payload + blockIdx.y * rows.stride;
  const bool grad_aligned = vector_aligned(values_of_row);
  const bool error_aligned = vector_aligned(error_of_row);
  int lost = 0;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int64_t offset = static_cast<int64_t>(blockIdx.x) * kBlock + group_offset(group);
    const auto index = static_cast<uint32_t>(begin + offset);
    float values[4];
    load_four(values_of_row, offset, own, grad_aligned, values);
    const auto scales = format.scales(offset, own, index);
    scales.divide(values);
    lost += correct_and_quantize(format, scales, values, error_of_row, error_aligned, offset, own, index, row,
                                 rows.shard);
  }
  if (lost != 0 && dropped != nullptr) atomicAdd(dropped, lost);
}

template <typename Format>
__global__ __launch_bounds__(kThreads) void average_kernel(const int32_t* payloads, Rows ranks, float factor,
                                                           float* error, int64_t n, Format format,
                                                           int32_t* out, int32_t* dropped) {
  const bool aligned = vector_aligned(error);
  int lost = 0;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int64_t offset = static_cast<int64_t>(blockIdx.x) * kBlock + group_offset(group);
    float mean[4] = {};
    if (offset < n) {
      for (int64_t rank = 0; rank < ranks.count; ++rank) {
        float values[4];
        Format::load(payloads + rank * ranks.stride, ranks.shard, offset, factor, values);
#pragma unroll
        for (int i = 0; i < 4; ++i) mean[i] += values[i];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      mean[i] = offset + i < n ? mean[i] / (static_cast<float>(ranks.count) * factor) : 0.0f;
    }
    const auto index = static_cast<uint32_t>(offset);
    const auto scales = format.scales(offset, n, index);  // by which all ranks have divided
    lost += correct_and_quantize(format, scales, mean, error, aligned, offset, n, index, out, ranks.shard);
  }
  if (lost != 0 && dropped != nullptr) atomicAdd(dropped, lost);
}

template <typename T, typename Format>
__global__ __launch_bounds__(kThreads) void decode_kernel(const int32_t* payload, Rows rows, int64_t n,
                                                          Format format, T* out) {
  const int64_t begin = blockIdx.y * rows.shard;
  const int64_t own = min(rows.shard, n - begin);
  const int32_t* row = payload + blockIdx.y * rows.stride;
  T* out_of_row = out + begin;
  const bool aligned = vector_aligned(out_of_row);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int64_t offset = static_cast<int64_t>(blockIdx.x) * kBlock + group_offset(group);
    if (offset / kScaleBlock * kScaleBlock >= own) return;  // alike in all lanes
    const auto index = static_cast<uint32_t>(begin + offset);
    float values[4];
    Format::load(row, rows.shard, offset, 1.0f, values);
    format.scales(offset, own, index).multiply(values);
    format.learn(values, offset, own, index);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = held(values[i] + 0.0f, out);
    store_four(values, out_of_row, offset, own, aligned);
  }
}

inline dim3 grid_of(const Rows& rows) {
  return {static_cast<unsigned>(block_count(rows.shard)), static_cast<unsigned>(rows.count)};
}

}  // namespace dear::compress::cuda
