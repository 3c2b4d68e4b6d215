// Sign compression. For C++ callers; compress/ops.py documents shapes, types and semantics, which are the
// same here.
#pragma once

#include "compress/ops/arguments.h"

namespace dear::compress::ops {

void sign_encode(const Tensor& grad, const OptionalTensor& error, const Tensor& payload,
                 const OptionalTensor& dropped, bool scaled);
void sign_vote(const Tensor& payloads, const Tensor& out, int64_t tie_breaker);
void sign_average(const Tensor& payloads, const OptionalTensor& error, const Tensor& out, int64_t numel,
                  const OptionalTensor& dropped);
void sign_decode(const Tensor& payload, const Tensor& out);

}  // namespace dear::compress::ops
