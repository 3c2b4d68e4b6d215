#include "compress/kernels/cpu/sign.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "compress/kernels/cpu/cast.h"
#include "compress/kernels/cpu/error_feedback.h"
#include "compress/kernels/cpu/streamed.h"
#include "float_bits.h"
#include "isa.h"

namespace dear::compress::cpu {

namespace {

constexpr int64_t kGrainBlocks = 8;

// Counters of 17 bits: up to 131071 voters.
constexpr int kMaxPlanes = 17;

// A mean that overflows is held at the largest float: the error feedback stays finite.
float clamp_scale(double mean) { return static_cast<float>(std::min(mean, static_cast<double>(FLT_MAX))); }

float record_scale(const int32_t* record) { return bits_float(static_cast<uint32_t>(record[0])); }

void set_record_scale(int32_t* record, float scale) { record[0] = static_cast<int32_t>(float_bits(scale)); }

}  // namespace

// Bits of whole words; `values` must hold words * 32 elements.
DEAR_CLONES void pack_words(const float* values, int64_t words, int32_t* out) {
  for (int64_t word = 0; word < words; ++word) {
    uint32_t packed = 0;
    for (int bit = 0; bit < kWordBits; ++bit) {
      packed |= (float_bits(values[word * kWordBits + bit]) >> 31) << bit;
    }
    out[word] = static_cast<int32_t>(~packed);
  }
}

// error = corrected - scale * sign(corrected), exact up to one rounding.
DEAR_CLONES void subtract_signs(float* values, int64_t n, float scale) {
  const uint32_t scale_bits = float_bits(scale);
  for (int64_t i = 0; i < n; ++i) {
    values[i] -= bits_float(scale_bits | (float_bits(values[i]) & kSignBit));
  }
}

DEAR_CLONES void unpack_words(const int32_t* words, int64_t n, float scale, float* out) {
  const uint32_t scale_bits = float_bits(scale);
  int64_t i = 0;
  for (; i + kWordBits <= n; i += kWordBits) {
    const uint32_t negative = ~static_cast<uint32_t>(words[i / kWordBits]);
    for (int bit = 0; bit < kWordBits; ++bit) {
      out[i + bit] = bits_float(scale_bits ^ ((negative >> bit) << 31));
    }
  }
  for (; i < n; ++i) {
    const uint32_t negative = ~static_cast<uint32_t>(words[i / kWordBits]) >> (i % kWordBits);
    out[i] = bits_float(scale_bits ^ (negative << 31));
  }
}

// sums[i] += +-scale over whole words.
DEAR_CLONES void add_signs(const int32_t* words, int64_t count, float scale, float* sums) {
  const uint32_t scale_bits = float_bits(scale);
  for (int64_t word = 0; word < count; ++word) {
    const uint32_t negative = ~static_cast<uint32_t>(words[word]);
    for (int bit = 0; bit < kWordBits; ++bit) {
      sums[word * kWordBits + bit] += bits_float(scale_bits ^ ((negative >> bit) << 31));
    }
  }
}

// One block of the majority vote: bit-sliced counters. Plane k holds bit k of the count of set bits of every
// element, so one word operation advances 32 counters and nothing is ever unpacked.
DEAR_CLONES void vote_block(const int32_t* payloads, int64_t voters, int64_t stride, int64_t tie_breaker,
                            int32_t* out) {
  uint32_t planes[kMaxPlanes][kBlockWords];
  int bits = 1;
  while ((voters >> bits) != 0) ++bits;
  std::memset(planes, 0, sizeof planes[0] * bits);

  uint32_t carry[kBlockWords];
  int64_t voter = 0;
  for (; voter + 2 <= voters; voter += 2) {
    // A carry-save adder takes two voters at once; only its carry has to ripple.
    const int32_t* a = payloads + voter * stride;
    const int32_t* b = a + stride;
    for (int64_t i = 0; i < kBlockWords; ++i) {
      const uint32_t left = static_cast<uint32_t>(a[i]);
      const uint32_t right = static_cast<uint32_t>(b[i]);
      const uint32_t half = left ^ right;
      carry[i] = (left & right) | (half & planes[0][i]);
      planes[0][i] ^= half;
    }
    for (int plane = 1; plane < bits; ++plane) {
      for (int64_t i = 0; i < kBlockWords; ++i) {
        const uint32_t next = planes[plane][i] & carry[i];
        planes[plane][i] ^= carry[i];
        carry[i] = next;
      }
    }
  }
  if (voter < voters) {
    const int32_t* a = payloads + voter * stride;
    for (int64_t i = 0; i < kBlockWords; ++i) carry[i] = static_cast<uint32_t>(a[i]);
    for (int plane = 0; plane < bits; ++plane) {
      for (int64_t i = 0; i < kBlockWords; ++i) {
        const uint32_t next = planes[plane][i] & carry[i];
        planes[plane][i] ^= carry[i];
        carry[i] = next;
      }
    }
  }

  // count > voters / 2, compared bit by bit from the top; what is still equal at the end is a tie.
  const int64_t half = voters / 2;
  uint32_t greater[kBlockWords] = {};
  uint32_t equal[kBlockWords];
  std::memset(equal, 0xff, sizeof equal);
  for (int plane = bits - 1; plane >= 0; --plane) {
    const uint32_t wanted = ((half >> plane) & 1) ? ~0u : 0u;
    for (int64_t i = 0; i < kBlockWords; ++i) {
      greater[i] |= equal[i] & planes[plane][i] & ~wanted;
      equal[i] &= ~(planes[plane][i] ^ wanted);
    }
  }
  const int32_t* decider = payloads + tie_breaker * stride;
  const uint32_t ties = voters % 2 == 0 ? ~0u : 0u;
  for (int64_t i = 0; i < kBlockWords; ++i) {
    out[i] = static_cast<int32_t>(greater[i] | (equal[i] & ties & static_cast<uint32_t>(decider[i])));
  }
}

namespace {

// Packs n corrected values into a record, and leaves the residual in `values` when asked to.
void pack_record(float* values, int64_t n, float scale, bool residual, int32_t* record) {
  const int64_t whole = n / kWordBits;
  set_record_scale(record, scale);
  pack_words(values, whole, record + 1);
  if (n % kWordBits != 0) {
    // Elements that do not exist read as -0: their bits are clear.
    float tail[kWordBits];
    std::fill(tail, tail + kWordBits, -0.0f);
    std::memcpy(tail, values + whole * kWordBits, (n % kWordBits) * sizeof(float));
    pack_words(tail, 1, record + 1 + whole);
  }
  const int64_t written = ceil_div(n, kWordBits);
  std::memset(record + 1 + written, 0, (kBlockWords - written) * sizeof(int32_t));
  if (residual) subtract_signs(values, n, scale);
}

}  // namespace

int64_t sign_encode(const void* grad, GradType type, float* error, int64_t n, int32_t* payload,
                    int64_t blocks, bool scaled) {
  std::atomic<int64_t> dropped{0};
  at::parallel_for(0, blocks, kGrainBlocks, [&](int64_t first, int64_t last) {
    alignas(64) float scratch[kBlock];
    alignas(64) float local[kBlock];
    int64_t count = 0;
    for (int64_t block = first; block < last; ++block) {
      const int64_t offset = block * kBlock;
      const int64_t length = std::min(kBlock, n - offset);
      int32_t* record = payload + block * kSignRecord;
      if (length <= 0) {
        std::memset(record, 0, kSignRecord * sizeof(int32_t));
        continue;
      }
      const float* values = load_block(element(grad, type, offset), type, length, scratch);
      float* corrected = error != nullptr ? error + offset : local;
      if (error == nullptr) std::memset(local, 0, length * sizeof(float));
      double magnitude;
      count += correct_block(values, corrected, corrected, length, &magnitude);
      const float scale = scaled ? clamp_scale(magnitude / static_cast<double>(length)) : 1.0f;
      pack_record(corrected, length, scale, error != nullptr, record);
    }
    dropped.fetch_add(count, std::memory_order_relaxed);
  });
  return dropped.load();
}

void sign_vote(const int32_t* payloads, int64_t voters, int64_t stride, int64_t blocks, int64_t tie_breaker,
               int32_t* out) {
  at::parallel_for(0, blocks, kGrainBlocks, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int32_t* records = payloads + block * kSignRecord;
      int32_t* record = out + block * kSignRecord;
      double sum = 0;
      for (int64_t voter = 0; voter < voters; ++voter) sum += record_scale(records + voter * stride);
      set_record_scale(record, static_cast<float>(sum / static_cast<double>(voters)));
      vote_block(records + 1, voters, stride, tie_breaker, record + 1);
    }
  });
}

int64_t sign_average(const int32_t* payloads, int64_t voters, int64_t stride, int64_t blocks, float* error,
                     int64_t n, int32_t* out) {
  std::atomic<int64_t> dropped{0};
  at::parallel_for(0, blocks, kGrainBlocks, [&](int64_t first, int64_t last) {
    alignas(64) float average[kBlock];
    alignas(64) float local[kBlock];
    int64_t count = 0;
    for (int64_t block = first; block < last; ++block) {
      const int64_t offset = block * kBlock;
      const int64_t length = std::min(kBlock, n - offset);
      int32_t* record = out + block * kSignRecord;
      if (length <= 0) {
        std::memset(record, 0, kSignRecord * sizeof(int32_t));
        continue;
      }
      const int32_t* records = payloads + block * kSignRecord;
      std::memset(average, 0, sizeof average);
      for (int64_t voter = 0; voter < voters; ++voter) {
        const int32_t* ballot = records + voter * stride;
        // Scales are divided, not the sum: the sum then cannot overflow, and needs no further rounding.
        add_signs(ballot + 1, ceil_div(length, kWordBits), record_scale(ballot) / static_cast<float>(voters),
                  average);
      }
      float* corrected = error != nullptr ? error + offset : local;
      if (error == nullptr) std::memset(local, 0, length * sizeof(float));
      double magnitude;
      count += correct_block(average, corrected, corrected, length, &magnitude);
      pack_record(corrected, length, clamp_scale(magnitude / static_cast<double>(length)), error != nullptr,
                  record);
    }
    dropped.fetch_add(count, std::memory_order_relaxed);
  });
  return dropped.load();
}

void sign_decode(const int32_t* payload, int64_t n, GradType type, void* out) {
  const DecodedResult result(out, type, n);
  at::parallel_for(0, block_count(n), kGrainBlocks, [&](int64_t first, int64_t last) {
    const StreamFence fence;
    alignas(64) float scratch[kBlock];
    for (int64_t block = first; block < last; ++block) {
      const int64_t offset = block * kBlock;
      const int64_t length = std::min(kBlock, n - offset);
      const int32_t* record = payload + block * kSignRecord;
      float* values = result.values(offset, scratch);
      unpack_words(record + 1, length, record_scale(record), values);
      result.store(offset, length, values);
    }
  });
}

}  // namespace dear::compress::cpu
