// Dense gradients in 16 bits. For C++ callers; compress/ops.py documents shapes, types and semantics, which
// are the same here.
#pragma once

#include "compress/ops/arguments.h"

namespace dear::compress::ops {

void dense_round(const Tensor& grad, const OptionalTensor& error, const Tensor& out,
                 const OptionalTensor& dropped);
void dense_average(const Tensor& payloads, const OptionalTensor& error, const Tensor& out,
                   const OptionalTensor& dropped);

// out [n] = the first `shard` elements of each of the rows [owners, ...], one after another. No operator of
// torch: a copy does the same.
void dense_decode(const Tensor& rows, int64_t shard, const Tensor& out);

}  // namespace dear::compress::ops
