// Launchers of the CUDA kernels for gradients in 2, 3 or 4 bits; semantics as in ../cpu/levels.h. `dropped`
// (may be null) is raised by the number of elements that were dropped.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "compress/kernels/scaled_rows.h"

namespace dear::compress::cuda {

void levels_encode(const void* grad, GradType type, float* error, float* squares, int64_t n, const Rows& rows,
                   int bits, int32_t* payload, int32_t* dropped, cudaStream_t stream);

void levels_average(const int32_t* payloads, const Rows& ranks, float* error, float* squares, int64_t n,
                    int bits, int32_t* out, int32_t* dropped, cudaStream_t stream);

void levels_decode(const int32_t* payload, const Rows& rows, int64_t n, int bits, GradType type,
                   float* squares, void* out, cudaStream_t stream);

}  // namespace dear::compress::cuda
