#include "compress/kernels/cuda/common.cuh"
#include "compress/kernels/cuda/quantize.h"

namespace dear::compress::cuda {

namespace {

// A warp's share of a group (group_offset) is one block that has a scale of its own.
static_assert(kScaleBlock == 32 * 4);

__device__ __forceinline__ uint32_t* codes_of(int32_t* row) { return reinterpret_cast<uint32_t*>(row); }
__device__ __forceinline__ const uint32_t* codes_of(const int32_t* row) {
  return reinterpret_cast<const uint32_t*>(row);
}
__device__ __forceinline__ uint8_t* scales_of(int32_t* row, int64_t shard) {
  return reinterpret_cast<uint8_t*>(row) + shard;
}
__device__ __forceinline__ const uint8_t* scales_of(const int32_t* row, int64_t shard) {
  return reinterpret_cast<const uint8_t*>(row) + shard;
}

// Rounds four values of a warp's block, at `offset` of the row, and leaves in them what that lost. All lanes
// must call it; those behind `n`, the elements of the row, bring zeros.
template <CodeType kType>
__device__ __forceinline__ void quantize_four(float (&values)[4], int64_t offset, int64_t n, uint32_t index,
                                              Rounding rounding, int32_t* row, int64_t shard) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) largest = max(largest, bits_of(values[i]) & ~kSignBit);
  largest = __reduce_max_sync(kAllLanes, largest);
  const uint32_t byte = scale_byte(largest, kType);
  const float scale = scale_of(byte);
  const float inverse = inverse_scale_of(byte);
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t code = code_of<kType>(values[i] * inverse, rounding, index + static_cast<uint32_t>(i));
    word |= code << (8 * i);
    values[i] -= value_of<kType>(code) * scale;  // the product is exact, fused or not
  }
  if (offset >= n) return;
  codes_of(row)[offset / 4] = word;
  if (threadIdx.x % 32 == 0) scales_of(row, shard)[offset / kScaleBlock] = static_cast<uint8_t>(byte);
}

// What four codes of a row say, times a power of two.
template <CodeType kType>
__device__ __forceinline__ void load_codes(const int32_t* row, int64_t shard, int64_t offset, float factor,
                                           float (&values)[4]) {
  const uint32_t word = codes_of(row)[offset / 4];
  const float scale = scale_of(scales_of(row, shard)[offset / kScaleBlock]) * factor;
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = value_of<kType>(word >> (8 * i) & 0xffu) * scale;
}

// Adds the error, where there is one, rounds, and stores what that lost; returns how many were dropped.
template <CodeType kType>
__device__ __forceinline__ int correct_and_quantize(const float (&values)[4], float* error, bool aligned,
                                                    int64_t offset, int64_t n, uint32_t index,
                                                    Rounding rounding, int32_t* row, int64_t shard) {
  float kept[4] = {};
  if (error != nullptr) load_four(error, offset, n, aligned, kept);
  const int lost = correct_four(values, kept, kept, kLargestQuantized);
  quantize_four<kType>(kept, offset, n, index, rounding, row, shard);
  if (error != nullptr) store_four(kept, error, offset, n, aligned);
  return lost;
}

// One block of one row: the grid is [rows, blocks of a row].
template <typename T, CodeType kType>
__global__ __launch_bounds__(kThreads) void encode_kernel(const T* grad, float* error, int64_t n, Rows rows,
                                                          Rounding rounding, int32_t* payload,
                                                          int32_t* dropped) {
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
    float values[4];
    load_four(values_of_row, offset, own, grad_aligned, values);
    lost += correct_and_quantize<kType>(values, error_of_row, error_aligned, offset, own,
                                        static_cast<uint32_t>(begin + offset), rounding, row, rows.shard);
  }
  if (lost != 0 && dropped != nullptr) atomicAdd(dropped, lost);
}

template <CodeType kType>
__global__ __launch_bounds__(kThreads) void average_kernel(const int32_t* payloads, Rows ranks, float factor,
                                                           float* error, int64_t n, Rounding rounding,
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
        load_codes<kType>(payloads + rank * ranks.stride, ranks.shard, offset, factor, values);
#pragma unroll
        for (int i = 0; i < 4; ++i) mean[i] += values[i];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      mean[i] = offset + i < n ? mean[i] / (static_cast<float>(ranks.count) * factor) : 0.0f;
    }
    lost += correct_and_quantize<kType>(mean, error, aligned, offset, n, static_cast<uint32_t>(offset),
                                        rounding, out, ranks.shard);
  }
  if (lost != 0 && dropped != nullptr) atomicAdd(dropped, lost);
}

template <typename T, CodeType kType>
__global__ __launch_bounds__(kThreads) void decode_kernel(const int32_t* payload, Rows rows, int64_t n,
                                                          T* out) {
  const int64_t begin = blockIdx.y * rows.shard;
  const int64_t own = min(rows.shard, n - begin);
  const int32_t* row = payload + blockIdx.y * rows.stride;
  T* out_of_row = out + begin;
  const bool aligned = vector_aligned(out_of_row);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int64_t offset = static_cast<int64_t>(blockIdx.x) * kBlock + group_offset(group);
    if (offset >= own) return;
    float values[4];
    load_codes<kType>(row, rows.shard, offset, 1.0f, values);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = held(values[i] + 0.0f, out);
    store_four(values, out_of_row, offset, own, aligned);
  }
}

dim3 grid_of(const Rows& rows) {
  return {static_cast<unsigned>(block_count(rows.shard)), static_cast<unsigned>(rows.count)};
}

// Calls the launcher with the type of the codes.
template <typename Body>
void dispatch_code(CodeType code, const Body& body) {
  if (code == CodeType::kInt8) {
    body(std::integral_constant<CodeType, CodeType::kInt8>{});
  } else {
    body(std::integral_constant<CodeType, CodeType::kFloat8>{});
  }
}

}  // namespace

void quantize_encode(const void* grad, GradType type, float* error, int64_t n, const Rows& rows,
                     CodeType code, Rounding rounding, int32_t* payload, int32_t* dropped,
                     cudaStream_t stream) {
  if (n == 0) return;
  dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    dispatch_code(code, [&](auto kind) {
      encode_kernel<T, kind.value><<<grid_of(rows), kThreads, 0, stream>>>(
          static_cast<const T*>(grad), error, n, rows, rounding, payload, dropped);
    });
  });
}

void quantize_average(const int32_t* payloads, const Rows& ranks, float* error, int64_t n, CodeType code,
                      Rounding rounding, int32_t* out, int32_t* dropped, cudaStream_t stream) {
  if (n == 0) return;
  const auto blocks = static_cast<unsigned>(block_count(n));
  dispatch_code(code, [&](auto kind) {
    average_kernel<kind.value><<<blocks, kThreads, 0, stream>>>(payloads, ranks, average_scale(ranks.count),
                                                                error, n, rounding, out, dropped);
  });
}

void quantize_decode(const int32_t* payload, const Rows& rows, int64_t n, CodeType code, GradType type,
                     void* out, cudaStream_t stream) {
  if (n == 0) return;
  dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    dispatch_code(code, [&](auto kind) {
      decode_kernel<T, kind.value>
          <<<grid_of(rows), kThreads, 0, stream>>>(payload, rows, n, static_cast<T*>(out));
    });
  });
}

}  // namespace dear::compress::cuda
