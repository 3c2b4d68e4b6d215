// Checks of payloads whose blocks of elements have a scale each.
#pragma once

#include "compress/kernels/scaled_rows.h"
#include "compress/ops/arguments.h"

namespace dear::compress::ops {

inline Rows rows_of(const Tensor& payload, int64_t shard) {
  return {payload.size(0), payload.stride(0), shard};
}

// `words`: of a row, as the shard's format has it.
void check_rows(const Tensor& payload, int64_t shard, int64_t words, const Tensor& data);
void check_shards(const Tensor& payload, int64_t shard, int64_t words, const Tensor& grad);
// Of an owner: its row, how many elements of its shard exist, and its error.
void check_mean(const Tensor& out, int64_t shard, int64_t words, int64_t numel, const OptionalTensor& error);

}  // namespace dear::compress::ops
