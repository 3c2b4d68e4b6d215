#include "precondition/triangles.h"

#include <ATen/Dispatch.h>

#include <algorithm>

namespace dear::precondition {
namespace {

// Rows and columns that are mirrored at a time, so that both sides stay in the cache.
constexpr int64_t kTile = 32;

template <typename T>
void mirror(T* matrix, int64_t n) {
  for (int64_t top = 0; top < n; top += kTile) {
    for (int64_t left = top; left < n; left += kTile) {
      for (int64_t row = top; row < std::min(top + kTile, n); ++row) {
        for (int64_t column = std::max(left, row + 1); column < std::min(left + kTile, n); ++column) {
          matrix[column * n + row] = matrix[row * n + column];
        }
      }
    }
  }
}

}  // namespace

void write_triangles(const at::Tensor& matrices, const at::Tensor& triangles) {
  const int64_t blocks = matrices.size(0);
  const int64_t n = matrices.size(1);
  TORCH_CHECK_VALUE(matrices.is_cpu() && triangles.is_cpu() && matrices.dim() == 3 && matrices.size(2) == n &&
                        triangles.is_contiguous() && triangles.scalar_type() == matrices.scalar_type() &&
                        triangles.numel() == blocks * n * (n + 1) / 2,
                    "triangles must be packed host memory of the matrices' type and size.");
  const at::Tensor packed = matrices.contiguous();
  AT_DISPATCH_FLOATING_TYPES(packed.scalar_type(), "write_triangles", [&] {
    const auto* from = packed.const_data_ptr<scalar_t>();
    auto* to = triangles.mutable_data_ptr<scalar_t>();
    for (int64_t row = 0; row < blocks * n; ++row, from += n) {
      to = std::copy(from + row % n, from + n, to);
    }
  });
}

at::Tensor from_triangles(const at::Tensor& triangles, int64_t blocks, int64_t n) {
  TORCH_CHECK_VALUE(
      triangles.is_cpu() && triangles.is_contiguous() && triangles.numel() == blocks * n * (n + 1) / 2,
      "triangles must be packed host memory of that many matrices.");
  at::Tensor matrices = at::empty({blocks, n, n}, triangles.options());
  AT_DISPATCH_FLOATING_TYPES(triangles.scalar_type(), "from_triangles", [&] {
    const auto* from = triangles.const_data_ptr<scalar_t>();
    auto* to = matrices.mutable_data_ptr<scalar_t>();
    for (int64_t block = 0; block < blocks; ++block, to += n * n) {
      for (int64_t row = 0; row < n; ++row) {
        const int64_t length = n - row;
        std::copy_n(from, length, to + row * n + row);
        from += length;
      }
      mirror(to, n);
    }
  });
  return matrices;
}

}  // namespace dear::precondition
