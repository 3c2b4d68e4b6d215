// Launchers of the CUDA top-k kernels. Semantics as in ../cpu/topk.h; everything runs in stream order, counts
// stay on the device, nothing allocates or waits. `workspace` is int32, laid out by TopkWorkspace.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "compress/layout.h"

namespace dear::compress::cuda {

// Where the parts of the workspace for n elements begin.
struct TopkWorkspace {
  uint32_t* masks;      // kBlockWords per block: one bit per element at or above the threshold
  uint32_t* counts;     // per block: those above the threshold, and those equal to it
  uint32_t* histogram;  // kHistogramBins for each of the three digits
  uint32_t* state;  // 0: the bits found so far, 1: the rank wanted among those that share them, 2: how many
                    // elements the threshold that stands selects

  TopkWorkspace(int32_t* base, int64_t n)
      : masks(reinterpret_cast<uint32_t*>(base)),
        counts(masks + topk_mask_words(n)),
        histogram(counts + 2 * block_count(n)),
        state(histogram + 3 * kHistogramBins) {}
};

void topk_threshold(const void* grad, GradType type, const float* error, int64_t n, int64_t k,
                    float* threshold, int32_t* ties, int32_t* workspace, cudaStream_t stream);

void topk_refresh(const void* grad, GradType type, const float* error, int64_t n, int64_t k, int64_t slack,
                  float* threshold, int32_t* ties, int32_t* workspace, cudaStream_t stream);

// `threshold` and `ties` (null: all) are read on the device. stats[0] is raised by the number of elements
// selected before capacities, stats[1] by the number that were not finite.
void topk_select(const Correction& values, const float* threshold, const int32_t* ties, const Slots& slots,
                 int32_t* stats, int32_t* workspace, cudaStream_t stream);

void topk_accumulate(const int32_t* payloads, int64_t lists, int64_t capacity, float alpha, float* dense,
                     int64_t n, int32_t* dropped, cudaStream_t stream);

void topk_decode(const int32_t* payloads, int64_t owners, int64_t capacity, int64_t shard_numel, float alpha,
                 GradType type, void* out, int64_t n, cudaStream_t stream);

}  // namespace dear::compress::cuda
