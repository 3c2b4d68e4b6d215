// Launchers of the CUDA kernels for gradients in eight bits; semantics as in ../cpu/quantize.h. `dropped`
// (may be null) is raised by the number of elements that were dropped.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "compress/kernels/quantize.h"

namespace dear::compress::cuda {

void quantize_encode(const void* grad, GradType type, float* error, int64_t n, const Rows& rows,
                     CodeType code, Rounding rounding, int32_t* payload, int32_t* dropped,
                     cudaStream_t stream);

void quantize_average(const int32_t* payloads, const Rows& ranks, float* error, int64_t n, CodeType code,
                      Rounding rounding, int32_t* out, int32_t* dropped, cudaStream_t stream);

void quantize_decode(const int32_t* payload, const Rows& rows, int64_t n, CodeType code, GradType type,
                     void* out, cudaStream_t stream);

}  // namespace dear::compress::cuda
