// Dense gradients in 16 bits. For C++ callers; compress/ops.py documents shapes, types and semantics, which
// are the same here.
#pragma once

#include "compress/ops/arguments.h"

namespace dear::compress::ops {

void dense_round(const Tensor& grad, const OptionalTensor& error, const Tensor& out,
                 const OptionalTensor& dropped);
void dense_average(const Tensor& payloads, const OptionalTensor& error, const Tensor& out,
                   const OptionalTensor& dropped);

}  // namespace dear::compress::ops
