// Orthonormal columns for a batch of tall matrices, by Cholesky-QR.
//
// The result depends on the input alone: not on the number of threads, nor on the instruction set. Products
// of two float32 are exact in float64, sums run in a fixed order, and nothing is contracted. So ranks that
// hold the same matrix get the same bits, even on different processors.
#pragma once

#include <cstdint>

namespace dear::compress::cpu {

// Replaces each [rows, columns] row-major matrix by Q with orthonormal columns, span(Q) = span(A) where A has
// full column rank, and Q^T A upper triangular with a positive diagonal. Columns that depend on those before
// them (to 1e-6 of their norm) are replaced by unit vectors made orthogonal. Non-finite entries count as 0.
// 1 <= columns <= rows. The workspace holds a columns * columns Gram matrix for every kGramRows rows, and one
// more element, for each matrix.
void orthogonalize(float* matrices, int64_t batch, int64_t rows, int64_t columns, double* workspace);

}  // namespace dear::compress::cpu
