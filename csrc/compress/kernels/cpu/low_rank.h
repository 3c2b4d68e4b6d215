// Low-rank factors of a batch of matrices of one shape, in one sweep over the data. All matrices are
// row-major.
#pragma once

#include <cstdint>

#include "compress/layout.h"

namespace dear::compress::cpu {

// Note [Four passes]
// What the factors of a step do not say is the next step's error: E = C - P Q^T. It is not written. The
// memory of the error keeps C, and the factors stay pending: the next sweep takes them out of a row, and adds
// the gradient to it, while the row is in a cache. So a step reads the gradient and the memory of the error
// once, and writes the latter once; decoding is the fourth pass. Whoever wants the error itself (a
// checkpoint, a group that is made anew) has it written first, by low_rank_subtract, whose bits are the
// sweep's.
struct Projection {
  const void* grad;       // flat, or null: nothing is added to the error
  GradType type;          // of grad
  const int64_t* starts;  // [count] where in grad each matrix begins
  float* error;           // [count, rows, columns]
  const float* fixed;     // [count, columns, rank], or [count, rows, rank] when transposed
  float* factor;          // [count, rows, rank], or [count, columns, rank] when transposed
  bool residual;
  const float* pending_p = nullptr;  // [count, rows, rank], taken out of the error first; or null
  const float* pending_q = nullptr;  // [count, columns, rank]
};

// error += grad, called c; factor = c fixed, or c^T fixed when transposed; with `residual` then
// error = c - P Q^T of factor and fixed. Returns how many elements of the gradient and of the factor were
// dropped (Note [Overflow in low-rank factors]): there the error stands, or the factor is zero. Where
// c - P Q^T is not finite all the same, the error stays c, and that counts too. The bits depend on the input
// and the instruction set, not on the number of threads.
int64_t low_rank_project(const BatchShape& batch, const Projection& projection, bool transposed);

// error [count, rows, columns] -= P Q^T, where that is finite; returns where it is not.
int64_t low_rank_subtract(const BatchShape& batch, const float* p, const float* q, float* error);

// Matrix b of `out`, which begins at element starts[b], becomes P Q^T of p [count, rows, rank] and
// q [count, columns, rank], held within the range of `type`. Ranks that hold the same factors get the same
// bits, even on different processors.
void low_rank_decode(const BatchShape& batch, const float* p, const float* q, const int64_t* starts,
                     GradType type, void* out);

// Loops run along the rows of the matrices. For that Q [length, rank] is laid "across": [padded rank,
// length], the rows of the padding zero.
void lay_across(const float* factor, int64_t length, int64_t rank, float* across);

}  // namespace dear::compress::cpu
