// Adding a gradient to the error feedback. For C++ callers; compress/ops.py documents shapes, types and
// semantics, which are the same here.
#pragma once

#include "compress/ops/arguments.h"

namespace dear::compress::ops {

void error_correct(const Tensor& grad, const Tensor& error, const OptionalTensor& dropped);

}  // namespace dear::compress::ops
