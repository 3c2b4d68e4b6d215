// Launchers of the CUDA kernels for 16-bit dense gradients; semantics as in ../cpu/dense.h. `dropped` (may be
// null) is raised by the number of elements that were dropped or are not finite.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "compress/layout.h"

namespace dear::compress::cuda {

void dense_round(const void* grad, GradType type, float* error, int64_t n, GradType out_type, void* out,
                 int32_t* dropped, cudaStream_t stream);

void dense_average(const void* payloads, GradType type, int64_t ranks, int64_t stride, float* error,
                   int64_t n, void* out, int32_t* dropped, cudaStream_t stream);

}  // namespace dear::compress::cuda
