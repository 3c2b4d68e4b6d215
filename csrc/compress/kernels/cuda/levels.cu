#include "compress/kernels/cuda/common.cuh"
#include "compress/kernels/cuda/levels.h"

namespace dear::compress::cuda {

namespace {

// A warp's share of a group (group_offset) is one block that has a step of its own, four elements a lane.
static_assert(kScaleBlock == 32 * 4);

__device__ __forceinline__ uint16_t* steps_of(int32_t* row, int64_t shard, int bits) {
  return reinterpret_cast<uint16_t*>(row + shard * bits / 32);
}
__device__ __forceinline__ const uint16_t* steps_of(const int32_t* row, int64_t shard, int bits) {
  return reinterpret_cast<const uint16_t*>(row + shard * bits / 32);
}

// One field of a block's codes: a lane's four codes belong to four neighbouring words, at one place.
template <int kBits, int kNumber>
__device__ __forceinline__ void store_field(const uint32_t (&codes)[4], bool stores, int32_t* fields) {
  constexpr Field field = field_of(kBits, kNumber);
  constexpr int lanes = field.word_count() / 4;  // that hold the words' first places
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t word = (codes[i] >> field.shift & field.mask()) << (lane / lanes * field.width);
#pragma unroll
    for (int distance = lanes; distance < 32; distance *= 2) {
      word |= __shfl_xor_sync(kAllLanes, word, distance);
    }
    if (stores && lane < lanes) fields[field.words + 4 * lane + i] = static_cast<int32_t>(word);
  }
}

template <int kBits, int kNumber>
__device__ __forceinline__ void load_field(const int32_t* fields, uint32_t (&codes)[4]) {
  constexpr Field field = field_of(kBits, kNumber);
  constexpr int lanes = field.word_count() / 4;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto word = static_cast<uint32_t>(fields[field.words + 4 * (lane % lanes) + i]);
    codes[i] |= (word >> (lane / lanes * field.width) & field.mask()) << field.shift;
  }
}

// Rounds four values of a warp's block, at `offset` of the row, and leaves in them what that lost. All lanes
// must call it; those behind `n`, the elements of the row, bring zeros.
template <int kBits>
__device__ __forceinline__ void quantize_four(float (&values)[4], int64_t offset, int64_t n, int32_t* row,
                                              int64_t shard) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) largest = max(largest, bits_of(values[i]) & ~kSignBit);
  largest = __reduce_max_sync(kAllLanes, largest);
  const float factor = magnitude_factor(largest);
  int32_t sum = 0;
  int32_t squares = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int32_t magnitude = magnitude_of(values[i], factor);
    sum += magnitude;
    squares += magnitude * magnitude;
  }
  sum = __reduce_add_sync(kAllLanes, sum);
  squares = __reduce_add_sync(kAllLanes, squares);
  const float step = level_step<kBits>(largest, sum, squares);
  const float inverse = inverse_step(step);
  uint32_t codes[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Levelled rounded = level_of<kBits>(values[i], inverse);
    codes[i] = rounded.code;
    values[i] -= rounded.level * step;  // the product is exact, fused or not
  }
  const int64_t block = offset / kScaleBlock;
  const bool exists = block * kScaleBlock < n;  // alike in all lanes
  int32_t* fields = row + block * block_words(kBits);
  store_field<kBits, 0>(codes, exists, fields);
  if constexpr (field_count(kBits) > 1) store_field<kBits, 1>(codes, exists, fields);
  if (exists && threadIdx.x % 32 == 0) {
    steps_of(row, shard, kBits)[block] = static_cast<uint16_t>(bits_of(step) >> 16);
  }
}

// What four codes of a row say, times a power of two.
template <int kBits>
__device__ __forceinline__ void load_levels(const int32_t* row, int64_t shard, int64_t offset, float factor,
                                            float (&values)[4]) {
  const int64_t block = offset / kScaleBlock;
  const int32_t* fields = row + block * block_words(kBits);
  uint32_t codes[4] = {};
  load_field<kBits, 0>(fields, codes);
  if constexpr (field_count(kBits) > 1) load_field<kBits, 1>(fields, codes);
  const uint32_t half = steps_of(row, shard, kBits)[block];
  const float step = float_of(half << 16) * factor;
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = level_value<kBits>(codes[i]) * step;
}

// Adds the error, where there is one, rounds, and stores what that lost; returns how many were dropped.
template <int kBits>
__device__ __forceinline__ int correct_and_quantize(const float (&values)[4], float* error, bool aligned,
                                                    int64_t offset, int64_t n, int32_t* row, int64_t shard) {
  float kept[4] = {};
  if (error != nullptr) load_four(error, offset, n, aligned, kept);
  const int lost = correct_four(values, kept, kept, kLargestLevelled);
  quantize_four<kBits>(kept, offset, n, row, shard);
  if (error != nullptr) store_four(kept, error, offset, n, aligned);
  return lost;
}

// One block of one row: the grid is [rows, blocks of a row].
template <typename T, int kBits>
__global__ __launch_bounds__(kThreads) void encode_kernel(const T* grad, float* error, int64_t n, Rows rows,
                                                          int32_t* payload, int32_t* dropped) {
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
    lost += correct_and_quantize<kBits>(values, error_of_row, error_aligned, offset, own, row, rows.shard);
  }
  if (lost != 0 && dropped != nullptr) atomicAdd(dropped, lost);
}

template <int kBits>
__global__ __launch_bounds__(kThreads) void average_kernel(const int32_t* payloads, Rows ranks, float factor,
                                                           float* error, int64_t n, int32_t* out,
                                                           int32_t* dropped) {
  const bool aligned = vector_aligned(error);
  int lost = 0;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int64_t offset = static_cast<int64_t>(blockIdx.x) * kBlock + group_offset(group);
    float mean[4] = {};
    if (offset < n) {
      for (int64_t rank = 0; rank < ranks.count; ++rank) {
        float values[4];
        load_levels<kBits>(payloads + rank * ranks.stride, ranks.shard, offset, factor, values);
#pragma unroll
        for (int i = 0; i < 4; ++i) mean[i] += values[i];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      mean[i] = offset + i < n ? mean[i] / (static_cast<float>(ranks.count) * factor) : 0.0f;
    }
    lost += correct_and_quantize<kBits>(mean, error, aligned, offset, n, out, ranks.shard);
  }
  if (lost != 0 && dropped != nullptr) atomicAdd(dropped, lost);
}

template <typename T, int kBits>
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
    load_levels<kBits>(row, rows.shard, offset, 1.0f, values);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = held(values[i] + 0.0f, out);
    store_four(values, out_of_row, offset, own, aligned);
  }
}

dim3 grid_of(const Rows& rows) {
  return {static_cast<unsigned>(block_count(rows.shard)), static_cast<unsigned>(rows.count)};
}

// Calls the launcher with the number of bits.
template <typename Body>
void dispatch_bits(int bits, const Body& body) {
  if (bits == 2) {
    body(std::integral_constant<int, 2>{});
  } else if (bits == 3) {
    body(std::integral_constant<int, 3>{});
  } else {
    body(std::integral_constant<int, 4>{});
  }
}

}  // namespace

void levels_encode(const void* grad, GradType type, float* error, int64_t n, const Rows& rows, int bits,
                   int32_t* payload, int32_t* dropped, cudaStream_t stream) {
  if (n == 0) return;
  dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    dispatch_bits(bits, [&](auto width) {
      encode_kernel<T, width.value><<<grid_of(rows), kThreads, 0, stream>>>(static_cast<const T*>(grad),
                                                                            error, n, rows, payload, dropped);
    });
  });
}

void levels_average(const int32_t* payloads, const Rows& ranks, float* error, int64_t n, int bits,
                    int32_t* out, int32_t* dropped, cudaStream_t stream) {
  if (n == 0) return;
  const auto blocks = static_cast<unsigned>(block_count(n));
  dispatch_bits(bits, [&](auto width) {
    average_kernel<width.value><<<blocks, kThreads, 0, stream>>>(payloads, ranks, average_scale(ranks.count),
                                                                 error, n, out, dropped);
  });
}

void levels_decode(const int32_t* payload, const Rows& rows, int64_t n, int bits, GradType type, void* out,
                   cudaStream_t stream) {
  if (n == 0) return;
  dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    dispatch_bits(bits, [&](auto width) {
      decode_kernel<T, width.value>
          <<<grid_of(rows), kThreads, 0, stream>>>(payload, rows, n, static_cast<T*>(out));
    });
  });
}

}  // namespace dear::compress::cuda
