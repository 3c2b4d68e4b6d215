// What the CUDA kernels share: loads and stores of four elements, reductions over a thread block, bit tests.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cstdint>
#include <type_traits>

#include "compress/layout.h"

namespace dear::compress::cuda {

// One thread block works on one block of kBlock elements: 256 threads of 16 elements, in groups of four, so
// that every group is one 16-byte access and everything stays in registers between the passes.
constexpr int kThreads = 256;
constexpr int kGroups = static_cast<int>(kBlock) / kThreads / 4;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr uint32_t kSignBit = 0x80000000u;

// The first of the four elements of group `group` of this thread, counted from the start of the block. Eight
// neighbouring threads hold the 32 elements of one word.
__device__ __forceinline__ int group_offset(int group) {
  return (group * kThreads + static_cast<int>(threadIdx.x)) * 4;
}

__device__ __forceinline__ bool is_finite(float value) {
  return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u;
}

// The bits by which magnitudes are ordered.
__device__ __forceinline__ uint32_t magnitude_bits(float value) { return __float_as_uint(value) & ~kSignBit; }

// |value| <= limit, false for NaN.
__device__ __forceinline__ bool within(float value, float limit) {
  return magnitude_bits(value) <= __float_as_uint(limit);
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void from_float(float value, float* out) { *out = value; }
__device__ __forceinline__ void from_float(float value, __half* out) { *out = __float2half_rn(value); }
__device__ __forceinline__ void from_float(float value, __nv_bfloat16* out) {
  *out = __float2bfloat16_rn(value);
}

// The ends of a type's range.
__device__ __forceinline__ float largest_of(const float*) { return largest(GradType::kFloat32); }
__device__ __forceinline__ float largest_of(const __half*) { return largest(GradType::kFloat16); }
__device__ __forceinline__ float largest_of(const __nv_bfloat16*) { return largest(GradType::kBFloat16); }

// A decoded value held within the range of the gradients' type; NaN stays NaN.
template <typename T>
__device__ __forceinline__ float held(float value, const T* type) {
  const float limit = largest_of(type);
  return value > limit ? limit : value < -limit ? -limit : value;
}

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T values[4];
};

// Whether groups of four may be moved as one. A group's start is a multiple of four elements from `base`.
template <typename T>
__device__ __forceinline__ bool vector_aligned(const T* base) {
  return reinterpret_cast<uintptr_t>(base) % (4 * sizeof(T)) == 0;
}

// Elements [offset, offset + 4) of which those before n exist; the others read as 0.
template <typename T>
__device__ __forceinline__ void load_four(const T* base, int64_t offset, int64_t n, bool aligned,
                                          float (&out)[4]) {
  if (aligned && offset + 4 <= n) {
    const auto four = *reinterpret_cast<const Four<T>*>(base + offset);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = to_float(four.values[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = offset + i < n ? to_float(base[offset + i]) : 0.0f;
}

template <typename T>
__device__ __forceinline__ void store_four(const float (&in)[4], T* base, int64_t offset, int64_t n,
                                           bool aligned) {
  if (aligned && offset + 4 <= n) {
    Four<T> four;
#pragma unroll
    for (int i = 0; i < 4; ++i) from_float(in[i], &four.values[i]);
    *reinterpret_cast<Four<T>*>(base + offset) = four;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (offset + i < n) from_float(in[i], &base[offset + i]);
  }
}

// The word that eight neighbouring threads make of four bits each; all eight get it.
__device__ __forceinline__ uint32_t gather_word(uint32_t nibble) {
  uint32_t word = nibble << (threadIdx.x % 8 * 4);
#pragma unroll
  for (int distance = 1; distance < 8; distance *= 2) word |= __shfl_xor_sync(kAllLanes, word, distance);
  return word;
}

// The sum over the thread block, in an order that never changes; every thread gets it. All threads must call
// it.
template <int kBlockThreads, typename T>
__device__ __forceinline__ T block_sum(T value) {
  __shared__ T partial[kBlockThreads / 32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  __syncthreads();  // the previous call's readers are done
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  T total = partial[0];
#pragma unroll
  for (int warp = 1; warp < kBlockThreads / 32; ++warp) total += partial[warp];
  return total;
}

// The sum of the values of all threads before this one; *total becomes the sum of all. All threads must call
// it.
template <int kBlockThreads, typename T>
__device__ __forceinline__ T block_exclusive_scan(T value, T* total) {
  __shared__ T partial[kBlockThreads / 32];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  T inclusive = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const T other = __shfl_up_sync(kAllLanes, inclusive, distance);
    if (lane >= distance) inclusive += other;
  }
  __syncthreads();  // the previous call's readers are done
  if (lane == 31) partial[warp] = inclusive;
  __syncthreads();
  T before = 0;
  T sum = 0;
#pragma unroll
  for (int other = 0; other < kBlockThreads / 32; ++other) {
    if (other == warp) before = sum;
    sum += partial[other];
  }
  *total = sum;
  return before + inclusive - value;
}

// corrected = grad + error, or error where that is not finite or exceeds the limit; returns how many do.
__device__ __forceinline__ int correct_four(const float (&grad)[4], const float (&error)[4],
                                            float (&corrected)[4], float limit = FLT_MAX) {
  int dropped = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float sum = grad[i] + error[i];
    const bool kept = within(sum, limit);
    corrected[i] = kept ? sum : error[i];
    dropped += kept ? 0 : 1;
  }
  return dropped;
}

// Calls the launcher for the gradient type: body.template operator()<T>() in the manner of C++20, for C++17.
template <typename Body>
void dispatch(GradType type, const Body& body) {
  switch (type) {
    case GradType::kFloat32:
      return body(static_cast<float*>(nullptr));
    case GradType::kFloat16:
      return body(static_cast<__half*>(nullptr));
    case GradType::kBFloat16:
      return body(static_cast<__nv_bfloat16*>(nullptr));
  }
}

}  // namespace dear::compress::cuda
