// Launchers of the CUDA kernels around the low-rank products; semantics as in ../cpu/low_rank.h. The tables
// of starts lie on the device. A matrix that would reach outside the gradient traps.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "compress/layout.h"

namespace dear::compress::cuda {

// What the first sweep of a step does to the memory of the error: see Note [Four passes] in
// ../cpu/low_rank.h.
struct Sweep {
  const void* grad;  // flat, or null: nothing is added
  GradType type;
  int64_t numel;           // of grad
  const int64_t* starts;   // [count] where in grad each matrix begins
  float* error;            // [count, rows, columns]
  const float* pending_p;  // [count, rows, rank], or null: nothing is taken out
  const float* pending_q;  // [count, columns, rank]
  int32_t* dropped;        // or null; raised by the number of elements that were dropped
};

// error -= P Q^T of the pending factors, then += the matrices of grad.
void correct_matrices(const BatchShape& batch, const Sweep& sweep, cudaStream_t stream);

// Makes zero of the elements of a factor that are not finite or too large, and raises `dropped` by them.
void limit_factor(float* factor, int64_t n, int32_t* dropped, cudaStream_t stream);

// error -= P Q^T; where that is not finite the error stands, and `dropped` is raised.
void low_rank_subtract(const BatchShape& batch, const float* p, const float* q, float* error,
                       int32_t* dropped, cudaStream_t stream);

// The matrices of `out`, which has `numel` elements, become P Q^T.
void low_rank_decode(const BatchShape& batch, const float* p, const float* q, const int64_t* starts,
                     GradType type, void* out, int64_t numel, cudaStream_t stream);

}  // namespace dear::compress::cuda
