// Top-k compression. For C++ callers; compress/ops.py documents shapes, types and semantics, which are the
// same here.
#pragma once

#include "compress/ops/arguments.h"

namespace dear::compress::ops {

void topk_threshold(const OptionalTensor& grad, const Tensor& error, int64_t k, const Tensor& threshold,
                    const Tensor& ties, const Tensor& workspace);
void topk_refresh(const OptionalTensor& grad, const Tensor& error, int64_t k, const Tensor& threshold,
                  const Tensor& ties, const Tensor& workspace, double tolerance);
void topk_select(const OptionalTensor& grad, const Tensor& error, const Tensor& threshold,
                 const OptionalTensor& ties, int64_t shard_numel, const Tensor& payload, const Tensor& stats,
                 const Tensor& workspace);
void topk_accumulate(const Tensor& payloads, const Tensor& dense, double alpha,
                     const OptionalTensor& dropped);
void topk_decode(const Tensor& payloads, const Tensor& out, int64_t shard_numel, double alpha);

}  // namespace dear::compress::ops
