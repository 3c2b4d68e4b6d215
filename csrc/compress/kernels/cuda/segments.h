// Launchers of the CUDA segment kernels; semantics as in ../cpu/segments.h. The table lies on the device. A
// segment that would reach outside the gradient (of `numel` elements) or the message traps.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "compress/layout.h"

namespace dear::compress::cuda {

// `dropped` (may be null) is raised by the number of elements that are not finite.
void gather_segments(const void* source, GradType type, int64_t numel, const Segment* segments, int64_t count,
                     float* message, int64_t message_numel, int32_t* dropped, cudaStream_t stream);

void scatter_segments(const float* message, int64_t message_numel, const Segment* segments, int64_t count,
                      GradType type, void* out, int64_t numel, cudaStream_t stream);

}  // namespace dear::compress::cuda
