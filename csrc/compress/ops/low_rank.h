// Low-rank compression. For C++ callers; compress/ops.py documents shapes, types and semantics, which are the
// same here.
#pragma once

#include "compress/ops/arguments.h"

namespace dear::compress::ops {

void low_rank_project(const OptionalTensor& grad, const Tensor& error, const Tensor& fixed,
                      const Tensor& factor, const OptionalTensor& starts, bool transposed, bool residual,
                      const OptionalTensor& dropped, const OptionalTensor& pending_p = {},
                      const OptionalTensor& pending_q = {});
void low_rank_subtract(const Tensor& error, const Tensor& p, const Tensor& q, const OptionalTensor& dropped);
void low_rank_decode(const Tensor& p, const Tensor& q, const Tensor& out, const Tensor& starts);
void orthogonalize(const Tensor& matrices, const Tensor& workspace);

}  // namespace dear::compress::ops
