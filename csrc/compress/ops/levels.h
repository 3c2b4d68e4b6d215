#pragma once

#include "compress/ops/arguments.h"

namespace dear::compress::ops {

// As compress/ops.py says.
void levels_encode(const Tensor& grad, const OptionalTensor& error, int64_t shard, const Tensor& payload,
                   const OptionalTensor& dropped, int64_t bits, const OptionalTensor& squares);
void levels_average(const Tensor& payloads, const OptionalTensor& error, int64_t shard, const Tensor& out,
                    int64_t numel, const OptionalTensor& dropped, int64_t bits,
                    const OptionalTensor& squares);
void levels_decode(const Tensor& payload, int64_t shard, const Tensor& out, int64_t bits,
                   const OptionalTensor& squares);

}  // namespace dear::compress::ops
