// Sign compression: one bit per element and one float32 scale per block of kBlock elements (layout.h).
//
// EF-SignSGD (Karimireddy et al., 2019) in the blockwise, two-way form of dist-EF-blockSGD (Zheng et al.,
// 2019). All functions are threaded; payload buffers are int32 words and need no alignment beyond that.
#pragma once

#include <cstdint>

#include "compress/layout.h"

namespace dear::compress::cpu {

// Packs n elements. With error feedback (`error` not null): c = grad + error, the payload holds sign(c) and
// mean |c| of each block, and error becomes c minus what the payload decodes to. Without: c = grad, with
// non-finite elements taken as 0. With `scaled` false the scale is 1. Blocks of the payload behind element n
// are filled with zeros. Returns how many elements were not finite.
int64_t sign_encode(const void* grad, GradType type, float* error, int64_t n, int32_t* payload,
                    int64_t blocks, bool scaled);

// Majority vote of `voters` payloads of `blocks` blocks each, payload v at payloads + v * stride. The bit
// that more than half of the voters set wins; when exactly half did, the bit of voter `tie_breaker` does. The
// scale is the mean of the voters' scales, added in voter order.
void sign_vote(const int32_t* payloads, int64_t voters, int64_t stride, int64_t blocks, int64_t tie_breaker,
               int32_t* out);

// Weighted vote: the average of the decoded payloads, compressed again. With `error` (n elements, not null)
// c = average + error, and error becomes c minus what `out` decodes to; else c = average. Returns how many
// elements of the average were dropped, because c was not finite.
int64_t sign_average(const int32_t* payloads, int64_t voters, int64_t stride, int64_t blocks, float* error,
                     int64_t n, int32_t* out);

// out[i] = +-scale of n elements, in the gradient type and held within its range.
void sign_decode(const int32_t* payload, int64_t n, GradType type, void* out);

}  // namespace dear::compress::cpu
