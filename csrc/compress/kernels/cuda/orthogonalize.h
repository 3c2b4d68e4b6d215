// Launcher of the CUDA orthogonalisation; semantics and workspace as in ../cpu/orthogonalize.h. The bits
// depend on the input and the device's architecture only. A fixed number of launches serves the whole batch:
// what each matrix still needs is decided on the device, and thread blocks with nothing to do return at once.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dear::compress::cuda {

void orthogonalize(float* matrices, int64_t batch, int64_t rows, int64_t columns, double* workspace,
                   cudaStream_t stream);

}  // namespace dear::compress::cuda
