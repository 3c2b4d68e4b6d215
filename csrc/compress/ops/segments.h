// Runs of a flat gradient. For C++ callers; compress/ops.py documents shapes, types and semantics, which are
// the same here.
#pragma once

#include "compress/ops/arguments.h"

namespace dear::compress::ops {

void gather_segments(const Tensor& source, const Tensor& table, const Tensor& message,
                     const OptionalTensor& dropped);
void scatter_segments(const Tensor& message, const Tensor& table, const Tensor& out);

}  // namespace dear::compress::ops
