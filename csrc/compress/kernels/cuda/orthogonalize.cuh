// What the kernels that orthogonalise share.
#pragma once

#include "compress/kernels/cuda/common.cuh"

namespace dear::compress::cuda {

// The tolerances of ../cpu/orthogonalize.cpp; here the inverse is not rounded, so one pass is enough for
// longer.
constexpr double kMinPivot = 1e-11;
constexpr double kOnePass = 1e7;
constexpr int kMaxPasses = 3;
constexpr double kDependent = 1e-6;

// What a matrix still needs; kept in the workspace, hence a double.
constexpr double kDone = 0;
constexpr double kApplyOnce = 1;
constexpr double kApplyAgain = 2;
constexpr double kFallback = 3;

// Matrices up to this size are the work of one thread block each.
constexpr int64_t kThinRank = 8;
constexpr int64_t kThinRows = 1 << 16;

// Cholesky-QR of matrices of that size; leaves in status, [batch], what each still needs: kDone, or else
// Gram-Schmidt.
void orthogonalize_thin(float* matrices, int64_t batch, int64_t rows, int64_t columns, double* status,
                        cudaStream_t stream);

}  // namespace dear::compress::cuda
