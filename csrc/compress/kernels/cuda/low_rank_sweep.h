// One launch for the first sweep of a step: the memory of the error is corrected and projected while a value
// is in a register.
#pragma once

#include "compress/kernels/cuda/low_rank.h"

namespace dear::compress::cuda {

// Whether it is worth it: the rank is small enough for registers, and the matrices are enough to fill the
// chip.
bool sweeps_at_once(const BatchShape& batch, bool transposed);

// correct_matrices, then factor = C fixed, or C^T fixed when transposed, without what limit_factor drops.
void low_rank_sweep(const BatchShape& batch, const Sweep& sweep, const float* fixed, float* factor,
                    bool transposed, cudaStream_t stream);

}  // namespace dear::compress::cuda
