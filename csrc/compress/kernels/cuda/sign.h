// Launchers of the CUDA sign kernels. Semantics as in ../cpu/sign.h; everything runs in stream order, nothing
// allocates or waits. `dropped` (may be null) is raised by the number of elements that were not finite.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "compress/layout.h"

namespace dear::compress::cuda {

void sign_encode(const void* grad, GradType type, float* error, int64_t n, int32_t* payload, int64_t blocks,
                 bool scaled, int32_t* dropped, cudaStream_t stream);
void sign_vote(const int32_t* payloads, int64_t voters, int64_t stride, int64_t blocks, int64_t tie_breaker,
               int32_t* out, cudaStream_t stream);
void sign_average(const int32_t* payloads, int64_t voters, int64_t stride, int64_t blocks, float* error,
                  int64_t n, int32_t* out, int32_t* dropped, cudaStream_t stream);
void sign_decode(const int32_t* payload, int64_t n, GradType type, void* out, cudaStream_t stream);

}  // namespace dear::compress::cuda
