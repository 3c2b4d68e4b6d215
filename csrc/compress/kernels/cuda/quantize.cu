#include "compress/kernels/cuda/quantize.h"
#include "compress/kernels/cuda/scaled_rows.cuh"

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

template <CodeType kType>
struct EightBits {
  static constexpr float largest = kLargestQuantized;
  Rounding rounding;

  __device__ __forceinline__ void quantize(float (&values)[4], int64_t offset, int64_t n, uint32_t index,
                                           int32_t* row, int64_t shard) const {
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

  __device__ __forceinline__ NoScales scales(int64_t, int64_t, uint32_t) const { return {}; }
  __device__ __forceinline__ void learn(const float (&)[4], int64_t, int64_t, uint32_t) const {}

  __device__ __forceinline__ static void load(const int32_t* row, int64_t shard, int64_t offset, float factor,
                                              float (&values)[4]) {
    const uint32_t word = codes_of(row)[offset / 4];
    const float scale = scale_of(scales_of(row, shard)[offset / kScaleBlock]) * factor;
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = value_of<kType>(word >> (8 * i) & 0xffu) * scale;
  }
};

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
      encode_kernel<<<grid_of(rows), kThreads, 0, stream>>>(
          static_cast<const T*>(grad), error, n, rows, EightBits<kind.value>{rounding}, payload, dropped);
    });
  });
}

void quantize_average(const int32_t* payloads, const Rows& ranks, float* error, int64_t n, CodeType code,
                      Rounding rounding, int32_t* out, int32_t* dropped, cudaStream_t stream) {
  if (n == 0) return;
  const auto blocks = static_cast<unsigned>(block_count(n));
  dispatch_code(code, [&](auto kind) {
    average_kernel<<<blocks, kThreads, 0, stream>>>(payloads, ranks, average_scale(ranks.count), error, n,
                                                    EightBits<kind.value>{rounding}, out, dropped);
  });
}

void quantize_decode(const int32_t* payload, const Rows& rows, int64_t n, CodeType code, GradType type,
                     void* out, cudaStream_t stream) {
  if (n == 0) return;
  dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    dispatch_code(code, [&](auto kind) {
      decode_kernel<<<grid_of(rows), kThreads, 0, stream>>>(payload, rows, n, EightBits<kind.value>{},
                                                            static_cast<T*>(out));
    });
  });
}

}  // namespace dear::compress::cuda
