#include <cfloat>

#include "compress/kernels/cuda/common.cuh"
#include "compress/kernels/cuda/sign.h"

namespace dear::compress::cuda {

namespace {

// The bits, the scale and the residual of one block whose corrected values lie in registers.
__device__ void write_record(float (&corrected)[kGroups][4], int64_t start, int64_t n, bool scaled,
                             float* error, bool aligned, int32_t* record) {
  const int64_t length = min(kBlock, n - start);
  float scale = 1;
  if (scaled) {
    float magnitude = 0;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < 4; ++i) magnitude += fabsf(corrected[group][i]);
    }
    const float total = block_sum<kThreads>(magnitude);
    scale = static_cast<float>(static_cast<double>(total) / static_cast<double>(length));
    if (!is_finite(
            total)) {  // the same in every thread: values near the largest float, added again in float64
      double wide = 0;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
#pragma unroll
        for (int i = 0; i < 4; ++i) wide += fabs(static_cast<double>(corrected[group][i]));
      }
      wide = block_sum<kThreads>(wide) / static_cast<double>(length);
      scale = static_cast<float>(wide < FLT_MAX ? wide : FLT_MAX);
    }
  }
  if (threadIdx.x == 0) record[0] = __float_as_int(scale);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int offset = group_offset(group);
    uint32_t nibble = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t sign = __float_as_uint(corrected[group][i]) & kSignBit;
      if (offset + i < length && sign == 0) nibble |= 1u << i;
      corrected[group][i] -= __uint_as_float(__float_as_uint(scale) | sign);
    }
    const uint32_t word = gather_word(nibble);
    if (threadIdx.x % 8 == 0) record[1 + offset / 32] = static_cast<int32_t>(word);
    if (error != nullptr) store_four(corrected[group], error, start + offset, n, aligned);
  }
}

__device__ void write_empty_record(int32_t* record) {
  for (int i = threadIdx.x; i < kSignRecord; i += kThreads) record[i] = 0;
}

template <typename T>
__global__ __launch_bounds__(kThreads) void encode_kernel(const T* grad, float* error, int64_t n,
                                                          int32_t* payload, bool scaled, int32_t* dropped) {
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kBlock;
  int32_t* record = payload + blockIdx.x * kSignRecord;
  if (start >= n) return write_empty_record(record);
  const bool grad_aligned = vector_aligned(grad);
  const bool error_aligned = vector_aligned(error);
  float corrected[kGroups][4];
  int lost = 0;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int64_t offset = start + group_offset(group);
    float own[4];
    float kept[4] = {};
    load_four(grad, offset, n, grad_aligned, own);
    if (error != nullptr) load_four(error, offset, n, error_aligned, kept);
    lost += correct_four(own, kept, corrected[group]);
  }
  if (lost != 0 && dropped != nullptr) atomicAdd(dropped, lost);
  write_record(corrected, start, n, scaled, error, error_aligned, record);
}

// kPlanes bits hold the count of set bits of each element; see ../cpu/sign.cpp.
template <int kPlanes>
__global__ __launch_bounds__(kBlockWords) void vote_kernel(const int32_t* payloads, int64_t voters,
                                                           int64_t stride, int64_t tie_breaker,
                                                           int32_t* out) {
  const int64_t record = static_cast<int64_t>(blockIdx.x) * kSignRecord;
  const int64_t word = record + 1 + threadIdx.x;
  uint32_t planes[kPlanes] = {};
  double scales = 0;
  for (int64_t voter = 0; voter < voters; ++voter) {
    uint32_t carry = static_cast<uint32_t>(payloads[voter * stride + word]);
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      const uint32_t next = planes[plane] & carry;
      planes[plane] ^= carry;
      carry = next;
    }
    if (threadIdx.x == 0) scales += __int_as_float(payloads[voter * stride + record]);
  }
  const int64_t half = voters / 2;
  uint32_t greater = 0;
  uint32_t equal = ~0u;
#pragma unroll
  for (int plane = kPlanes - 1; plane >= 0; --plane) {
    const uint32_t wanted = ((half >> plane) & 1) != 0 ? ~0u : 0u;
    greater |= equal & planes[plane] & ~wanted;
    equal &= ~(planes[plane] ^ wanted);
  }
  if (voters % 2 == 0) greater |= equal & static_cast<uint32_t>(payloads[tie_breaker * stride + word]);
  out[word] = static_cast<int32_t>(greater);
  if (threadIdx.x == 0)
    out[record] = __float_as_int(static_cast<float>(scales / static_cast<double>(voters)));
}

__global__ __launch_bounds__(kThreads) void average_kernel(const int32_t* payloads, int64_t voters,
                                                           int64_t stride, float* error, int64_t n,
                                                           int32_t* out, int32_t* dropped) {
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kBlock;
  const int64_t record = static_cast<int64_t>(blockIdx.x) * kSignRecord;
  if (start >= n) return write_empty_record(out + record);
  const bool aligned = vector_aligned(error);
  int lost = 0;
  float average[kGroups][4] = {};
  for (int64_t voter = 0; voter < voters; ++voter) {
    const int32_t* ballot = payloads + voter * stride + record;
    const uint32_t scale = __float_as_uint(__int_as_float(ballot[0]) / static_cast<float>(voters));
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int offset = group_offset(group);
      const uint32_t negative = ~static_cast<uint32_t>(ballot[1 + offset / 32]) >> (offset % 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) average[group][i] += __uint_as_float(scale ^ (negative >> i << 31));
    }
  }
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int64_t offset = start + group_offset(group);
    float kept[4] = {};
    if (error != nullptr) load_four(error, offset, n, aligned, kept);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float sum = average[group][i] + kept[i];
      // What lies behind the shard counts for nothing in the scale.
      average[group][i] = offset + i >= n ? 0.0f : is_finite(sum) ? sum : kept[i];
      lost += offset + i >= n || is_finite(sum) ? 0 : 1;
    }
  }
  if (lost != 0 && dropped != nullptr) atomicAdd(dropped, lost);
  write_record(average, start, n, true, error, aligned, out + record);
}

template <typename T>
__global__ __launch_bounds__(kThreads) void decode_kernel(const int32_t* payload, int64_t n, T* out) {
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kBlock;
  const int32_t* record = payload + blockIdx.x * kSignRecord;
  const bool aligned = vector_aligned(out);
  const uint32_t scale = static_cast<uint32_t>(record[0]);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int offset = group_offset(group);
    const uint32_t negative = ~static_cast<uint32_t>(record[1 + offset / 32]) >> (offset % 32);
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = held(__uint_as_float(scale ^ (negative >> i << 31)), out);
    store_four(values, out, start + offset, n, aligned);
  }
}

}  // namespace

void sign_encode(const void* grad, GradType type, float* error, int64_t n, int32_t* payload, int64_t blocks,
                 bool scaled, int32_t* dropped, cudaStream_t stream) {
  if (blocks == 0) return;
  dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    encode_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
        static_cast<const T*>(grad), error, n, payload, scaled, dropped);
  });
}

void sign_vote(const int32_t* payloads, int64_t voters, int64_t stride, int64_t blocks, int64_t tie_breaker,
               int32_t* out, cudaStream_t stream) {
  if (blocks == 0) return;
  const auto grid = static_cast<unsigned>(blocks);
  const auto threads = static_cast<unsigned>(kBlockWords);
  if (voters < 4) {
    vote_kernel<2><<<grid, threads, 0, stream>>>(payloads, voters, stride, tie_breaker, out);
  } else if (voters < 16) {
    vote_kernel<4><<<grid, threads, 0, stream>>>(payloads, voters, stride, tie_breaker, out);
  } else if (voters < 256) {
    vote_kernel<8><<<grid, threads, 0, stream>>>(payloads, voters, stride, tie_breaker, out);
  } else {
    vote_kernel<17><<<grid, threads, 0, stream>>>(payloads, voters, stride, tie_breaker, out);
  }
}

void sign_average(const int32_t* payloads, int64_t voters, int64_t stride, int64_t blocks, float* error,
                  int64_t n, int32_t* out, int32_t* dropped, cudaStream_t stream) {
  if (blocks == 0) return;
  average_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(payloads, voters, stride, error, n,
                                                                         out, dropped);
}

void sign_decode(const int32_t* payload, int64_t n, GradType type, void* out, cudaStream_t stream) {
  if (n == 0) return;
  dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    decode_kernel<T>
        <<<static_cast<unsigned>(block_count(n)), kThreads, 0, stream>>>(payload, n, static_cast<T*>(out));
  });
}

}  // namespace dear::compress::cuda
