#include "compress/kernels/cuda/levels.h"
#include "compress/kernels/cuda/scaled_rows.cuh"
#include "compress/kernels/element_scales.h"
#include "compress/kernels/levels.h"

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

template <int kBits, bool kScaled = false>
struct FewBits {
  static constexpr float largest = kLargestLevelled;

  __device__ __forceinline__ NoScales scales(int64_t, int64_t, uint32_t) const { return {}; }
  __device__ __forceinline__ void learn(const float (&)[4], int64_t, int64_t, uint32_t) const {}

  __device__ __forceinline__ void quantize(float (&values)[4], int64_t offset, int64_t n, uint32_t,
                                           int32_t* row, int64_t shard) const {
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
    const float step = level_step<kBits>(largest, sum, squares, level_factor(kBits, kScaled));
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

  __device__ __forceinline__ static void load(const int32_t* row, int64_t shard, int64_t offset, float factor,
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
};

struct ElementScales {
  float values[4];

  __device__ __forceinline__ void divide(float (&of)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) of[i] *= inverse_of_power(values[i]);
  }
  __device__ __forceinline__ void multiply(float (&of)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) of[i] *= values[i];
  }
};

// With a scale for each element. `squares`: of the elements that the index counts.
template <int kBits>
struct FewBitsByElement : FewBits<kBits, true> {
  float* squares;

  __host__ __device__ explicit FewBitsByElement(float* of) : squares(of) {}

  __device__ __forceinline__ ElementScales scales(int64_t offset, int64_t n, uint32_t index) const {
    int32_t exponents[4];
    int32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      exponents[i] = root_exponent(offset + i < n ? squares[index + i] : 0.0f);
      largest = max(largest, exponents[i]);
    }
    largest = __reduce_max_sync(kAllLanes, largest);
    int32_t sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += offset + i < n ? root_share(exponents[i], largest) : 0;
    sum = __reduce_add_sync(kAllLanes, sum);
    const int64_t behind = n - offset / kScaleBlock * kScaleBlock;
    const int32_t count = static_cast<int32_t>(behind < kScaleBlock ? max(behind, int64_t{1}) : kScaleBlock);
    const int32_t least = least_exponent(largest, sum, count);
    ElementScales found;
#pragma unroll
    for (int i = 0; i < 4; ++i) found.values[i] = scale_of_element(exponents[i], least);
    return found;
  }
  __device__ __forceinline__ void learn(const float (&values)[4], int64_t offset, int64_t n,
                                        uint32_t index) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (offset + i < n) squares[index + i] = with_result(squares[index + i], values[i]);
    }
  }
};

// Calls the launcher with the format of so many bits, with scales of elements where there are squares.
template <typename Body>
void dispatch_format(int bits, float* squares, const Body& body) {
  const auto with_scales = [&](auto width) {
    if (squares == nullptr) {
      body(FewBits<width.value>{});
    } else {
      body(FewBitsByElement<width.value>{squares});
    }
  };
  if (bits == 2) {
    with_scales(std::integral_constant<int, 2>{});
  } else if (bits == 3) {
    with_scales(std::integral_constant<int, 3>{});
  } else {
    with_scales(std::integral_constant<int, 4>{});
  }
}

}  // namespace

void levels_encode(const void* grad, GradType type, float* error, float* squares, int64_t n, const Rows& rows,
                   int bits, int32_t* payload, int32_t* dropped, cudaStream_t stream) {
  if (n == 0) return;
  dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    dispatch_format(bits, squares, [&](const auto& format) {
      encode_kernel<<<grid_of(rows), kThreads, 0, stream>>>(static_cast<const T*>(grad), error, n, rows,
                                                            format, payload, dropped);
    });
  });
}

void levels_average(const int32_t* payloads, const Rows& ranks, float* error, float* squares, int64_t n,
                    int bits, int32_t* out, int32_t* dropped, cudaStream_t stream) {
  if (n == 0) return;
  const auto blocks = static_cast<unsigned>(block_count(n));
  dispatch_format(bits, squares, [&](const auto& format) {
    average_kernel<<<blocks, kThreads, 0, stream>>>(payloads, ranks, average_scale(ranks.count), error, n,
                                                    format, out, dropped);
  });
}

void levels_decode(const int32_t* payload, const Rows& rows, int64_t n, int bits, GradType type,
                   float* squares, void* out, cudaStream_t stream) {
  if (n == 0) return;
  dispatch(type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    dispatch_format(bits, squares, [&](const auto& format) {
      decode_kernel<<<grid_of(rows), kThreads, 0, stream>>>(payload, rows, n, format, static_cast<T*>(out));
    });
  });
}

}  // namespace dear::compress::cuda
