// Top-k compression: selection by magnitude into fixed-capacity slots per owner (layout.h), and the owners'
// merge.
//
// Owner s holds the elements [s * shard_numel, (s + 1) * shard_numel); shard_numel is a multiple of kBlock
// unless there is one owner. A value that does not fit its owner's slot stays in the error feedback. All
// selection is deterministic: entries come in rising index order, and of equal magnitudes the lowest indices
// win.
#pragma once

#include <cstdint>

#include "compress/layout.h"

namespace dear::compress::cpu {

// The k-th largest |grad + error|, exactly: a sample bounds it from below, one pass collects what lies above
// the bound, and the k-th of those is found; where the sample cannot tell, radix selection on the bits takes
// three passes. *ties is how many of the elements of exactly that magnitude belong to the k. `grad` may be
// null. 1 <= k <= n. Where grad + error is not finite, error counts alone.
void topk_threshold(const void* grad, GradType type, const float* error, int64_t n, int64_t k,
                    float* threshold, int32_t* ties);

// Keeps the threshold that stands while the number of |grad + error| at or above it lies within `slack` of k;
// otherwise threshold and ties become those of topk_threshold.
void topk_refresh(const void* grad, GradType type, const float* error, int64_t n, int64_t k, int64_t slack,
                  float* threshold, int32_t* ties);

struct SelectCounts {
  int64_t found;    // elements at or above the threshold, before capacities
  int64_t dropped;  // elements where grad + error was not finite
};

// error += grad; elements with |error| >= threshold move into the owners' slots, and leave a zero behind.
// Of elements equal to the threshold at most `ties` are taken; negative means all. `masks` is kBlockWords
// words and `counts` two words for each block.
SelectCounts topk_select(const Correction& values, float threshold, int32_t ties, const Slots& slots,
                         int32_t* masks, int32_t* counts);

// dense[index] += alpha * value for every entry of `lists` slots over the same shard, in list order. Where
// the sum is not finite the entry is dropped. Returns how many were.
int64_t topk_accumulate(const int32_t* payloads, int64_t lists, int64_t capacity, float alpha, float* dense,
                        int64_t n);

// out = 0, then out[owner * shard_numel + index] = alpha * value, held within the range of `type`.
void topk_decode(const int32_t* payloads, int64_t owners, int64_t capacity, int64_t shard_numel, float alpha,
                 GradType type, void* out, int64_t n);

}  // namespace dear::compress::cpu
