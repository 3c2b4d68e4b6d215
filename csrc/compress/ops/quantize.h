#pragma once

#include "compress/ops/arguments.h"

namespace dear::compress::ops {

// As compress/ops.py says. `floating`: codes are e4m3fn, else int8. `key`: rounds stochastically, else to the
// nearest.
void quantize_encode(const Tensor& grad, const OptionalTensor& error, int64_t shard, const Tensor& payload,
                     const OptionalTensor& dropped, bool floating, std::optional<int64_t> key);
void quantize_average(const Tensor& payloads, const OptionalTensor& error, int64_t shard, const Tensor& out,
                      int64_t numel, const OptionalTensor& dropped, bool floating,
                      std::optional<int64_t> key);
void quantize_decode(const Tensor& payload, int64_t shard, const Tensor& out, bool floating);

}  // namespace dear::compress::ops
