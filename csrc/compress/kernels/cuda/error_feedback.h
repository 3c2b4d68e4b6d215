// Launcher of the CUDA error feedback kernel; semantics as in ../cpu/error_feedback.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "compress/layout.h"

namespace dear::compress::cuda {

// error += grad. `dropped` (may be null) is raised by the number of elements that were not finite.
void error_correct(const void* grad, GradType type, float* error, int64_t n, int32_t* dropped,
                   cudaStream_t stream);

}  // namespace dear::compress::cuda
