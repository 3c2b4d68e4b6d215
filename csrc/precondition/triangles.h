#pragma once

#include <ATen/ATen.h>

namespace dear::precondition {

// Symmetric matrices in a message: the rows of their upper triangles, one after another. On the host.

// Writes those of `matrices` [blocks, n, n] to `triangles` [blocks · n (n + 1) / 2], packed and of one type.
void write_triangles(const at::Tensor& matrices, const at::Tensor& triangles);

// The matrices [blocks, n, n] of such triangles.
at::Tensor from_triangles(const at::Tensor& triangles, int64_t blocks, int64_t n);

}  // namespace dear::precondition
