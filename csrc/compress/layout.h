// The layout of the compressed payloads, shared by the CPU kernels, the CUDA kernels and the operators.
// This header includes nothing of torch: nvcc reads it too.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DEAR_HOST_DEVICE __host__ __device__
#else
#define DEAR_HOST_DEVICE
#endif

namespace dear::compress {

// Every elementwise family works on blocks of this many elements: a block of gradient and a block of error
// stay in a CPU's first-level cache, and fit the registers of one CUDA thread block, so that values are read
// from memory once although the scale of a block is known only after all of it was seen.
constexpr int64_t kBlock = 4096;

DEAR_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DEAR_HOST_DEVICE constexpr int64_t block_count(int64_t numel) { return ceil_div(numel, kBlock); }

// Sign bits of 32 elements make one word. Bit j of word w belongs to element 32 * w + j of the block; it is
// set where the sign bit of the float is clear (+0 counts as positive, -0 as negative).
constexpr int64_t kWordBits = 32;
constexpr int64_t kBlockWords = kBlock / kWordBits;

// A sign payload is one record per block: the float32 scale, then the words. So the payload of any range of
// whole blocks is contiguous, and an all-to-all can cut it by owner without repacking.
constexpr int64_t kSignRecord = 1 + kBlockWords;
constexpr int64_t sign_payload_numel(int64_t numel) { return block_count(numel) * kSignRecord; }

// A sparse payload is one slot per owner: the count, then `capacity` indices relative to the owner's shard,
// in rising order, then `capacity` float32 values. What lies behind `count` entries is not written.
constexpr int64_t kSlotHeader = 1;
DEAR_HOST_DEVICE constexpr int64_t slot_words(int64_t capacity) { return kSlotHeader + 2 * capacity; }

// The slots of a sparse payload, one behind the other. Each owner but the last has `shard_numel` elements.
struct Slots {
  int32_t* words;
  int64_t owners;
  int64_t capacity;
  int64_t shard_numel;

  int32_t* of(int64_t owner) const { return words + owner * slot_words(capacity); }
};

// Workspace of the top-k kernels, in int32: one bit per element, two counts per block; and for the CUDA
// kernels a histogram per radix digit, and the state of the selection.
constexpr int64_t kHistogramBins = 2048;
constexpr int64_t kHistogramWords = 3 * kHistogramBins + 16;
constexpr int64_t topk_mask_words(int64_t numel) { return block_count(numel) * kBlockWords; }
constexpr int64_t topk_workspace_numel(int64_t numel) {
  return topk_mask_words(numel) + 2 * block_count(numel) + kHistogramWords;
}

// Note [Eight bits on the wire]
// Blocks of kScaleBlock elements share one scale, a power of two, as in the microscaling formats: so scaling
// is exact, and every processor gives the same bits. An owner's row holds the codes of its shard, a byte
// each, then a byte b for each block, whose scale is 2^(b - 127); b = 0 says that the block is zero. A shard
// is whole words of both. Elements beyond kLargestQuantized are dropped and counted, as what is not finite
// is: no decoded value, and no mean of them, can then overflow.
constexpr int64_t kScaleBlock = 128;
constexpr int64_t kScaleUnit = 4 * kScaleBlock;
constexpr int64_t quantized_words(int64_t shard) { return shard / 4 + shard / kScaleUnit; }
constexpr float kLargestQuantized = 0x1p126f;

// Note [Few bits on the wire]
// In 2, 3 or 4 bits an element is one of k = 2^(bits - 1) - 1 levels on each side of 0, times the step of its
// block of kScaleBlock elements. They are a step apart, but in 3 bits the outermost two: 0, 1, 2 and 4. The
// step is a float32 of which only the upper 16 bits are not zero: so its product with a level is exact, and
// every processor gives the same bits. It is smaller than what would reach the block's largest element: with
// so few levels a finer step loses less, and what is cut off stays in the error feedback (level_step).
//
// A code, the level's number + k, is one field of 2 or 4 bits, or one of 2 and one of 1. A field of f bits
// makes 4 f words of a block's elements: the word of element i is i % (4 f), and its place there i / (4 f),
// so that neighbours go to the same place of neighbouring words, as vector instructions want it. An owner's
// row holds the fields of each block, block after block, and then the steps' upper halves. A shard is a
// multiple of kScaleUnit. Elements beyond kLargestLevelled are dropped and counted; a block whose largest
// element is below kSmallestLevelled sends nothing, and stays in the error feedback.
constexpr int64_t levelled_words(int64_t shard, int64_t bits) {
  return shard * bits / 32 + shard / kScaleBlock / 2;
}
constexpr float kLargestLevelled = 0x1p100f;
constexpr float kSmallestLevelled = 0x1p-100f;

// Note [A scale for each element]
// Neighbours of a block differ in size, lastingly. In levels of one step a small one gets a rare level, far
// above what it is; what divides a gradient by its own deviation, as Adam does, then loses most. So every
// element may be divided by a scale of its own before it is rounded, and multiplied by it behind. Its scale
// comes from the running mean of the squares of its past results: the decoded means, which all ranks have, so
// that it costs no bytes. Behind dense steps it begins with the square of the last one's result.
//
// A scale is a power of two, so that dividing is exact, and is relative to its block: from 1, for what lies
// below an eighth of the block's mean root, to 2^10; all are equal where a block has no results yet. The mean
// is of powers of two as whole numbers, and in the running mean the new square, which is exact, weighs 2^-4:
// so every processor gives the same bits, and replicas stay equal.

// Rows of one partial Gram matrix: enough parts to share one tall matrix among threads.
constexpr int64_t kGramRows = 1024;
constexpr int64_t kMaxRank = 256;

// Gram matrices are stored with their rows padded to whole vectors of four.
DEAR_HOST_DEVICE constexpr int64_t padded_rank(int64_t columns) { return (columns + 3) / 4 * 4; }

// Workspace of orthogonalize, in float64: for each matrix a Gram matrix of every kGramRows rows, one more,
// and a status.
constexpr int64_t orthogonalize_workspace_numel(int64_t batch, int64_t rows, int64_t columns) {
  return batch * ((ceil_div(rows, kGramRows) + 1) * padded_rank(columns) * padded_rank(columns) + 1);
}

// Note [Overflow in low-rank factors]
// Gradients that are finite may still overflow when they are multiplied, or when factors are summed over the
// ranks. So two bounds hold, far above what training survives:
// - An element of a matrix, plus its error, of more than kLargestElement is dropped and counted, as one that
//   is not finite. Its product with an orthonormal factor then stays below 2^106, for up to 2^31 elements.
// - An element of a factor of more than kLargestFactor becomes zero and is counted. That can only be one of
//   Power-SGD's P, whose other factor is not orthonormal. What it would have said stays in the error
//   feedback.
// Sums of factors over 2^17 ranks, and the decoded product with an orthonormal factor, are finite then. All
// is known once the first message is encoded, before anything is exchanged.
constexpr float kLargestElement = 0x1p90f;
constexpr float kLargestFactor = 0x1p110f;

// Matrices of one shape [rows, columns], row-major, and of the rank of their factors P [rows, rank] and
// Q [columns, rank].
struct BatchShape {
  int64_t count;
  int64_t rows;
  int64_t columns;
  int64_t rank;

  DEAR_HOST_DEVICE int64_t numel() const { return rows * columns; }
};

// A run of a flat gradient and its place in a message: one row of an int64 table [segments, 3].
struct Segment {
  int64_t start;
  int64_t numel;
  int64_t position;

  DEAR_HOST_DEVICE bool within(int64_t grad_numel, int64_t message_numel) const {
    return start >= 0 && numel >= 0 && position >= 0 && start <= grad_numel - numel &&
           position <= message_numel - numel;
  }
};

// The gradient types. Error feedback and arithmetic are float32 always.
enum class GradType : int { kFloat32, kFloat16, kBFloat16 };

// A flat gradient, null where there is none, and the error feedback of as many elements that takes it in.
struct Correction {
  const void* grad;
  GradType type;
  float* error;
  int64_t numel;
};

constexpr int64_t grad_bytes(GradType type) { return type == GradType::kFloat32 ? 4 : 2; }

// What values are multiplied by before `ranks` of them are summed, so that the sum does not overflow where
// the mean does not: the power of two that is at most 1 / ranks. Scaling by it changes no bits of the mean.
constexpr float average_scale(int64_t ranks) {
  float scale = 1;
  for (int64_t power = 1; power < ranks; power *= 2) scale /= 2;
  return scale;
}

// The largest finite value of a type.
DEAR_HOST_DEVICE constexpr float largest(GradType type) {
  return type == GradType::kFloat16 ? 65504.0f : type == GradType::kBFloat16 ? 0x1.fep127f : 0x1.fffffep127f;
}

}  // namespace dear::compress
