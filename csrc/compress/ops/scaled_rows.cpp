#include "compress/ops/scaled_rows.h"

#include <c10/util/Exception.h>

namespace dear::compress::ops {

void check_rows(const Tensor& payload, int64_t shard, int64_t words, const Tensor& data) {
  TORCH_CHECK_VALUE(shard >= 0 && shard % kScaleUnit == 0, "the shard has ", shard,
                    " elements: give a multiple of ", kScaleUnit, ".");
  TORCH_CHECK_TYPE(payload.scalar_type() == at::kInt, "the payload must be Int, but it is ",
                   payload.scalar_type(), ": convert it first.");
  check_same_device(payload, data, "the payload", "the data");
  TORCH_CHECK_VALUE(payload.dim() == 2 && payload.size(0) >= 1 && payload.size(1) == words &&
                        (payload.size(1) <= 1 || payload.stride(1) == 1),
                    "the payload must be [rows, ", words, "] with packed rows, but it is ", payload.sizes(),
                    ": give each shard that many words.");
}

void check_shards(const Tensor& payload, int64_t shard, int64_t words, const Tensor& grad) {
  check_grad(grad);
  check_rows(payload, shard, words, grad);
  TORCH_CHECK_VALUE(payload.size(0) * shard >= grad.numel(), "the gradient has ", grad.numel(),
                    " elements, but the shards hold ", payload.size(0) * shard, ": give more rows.");
}

void check_mean(const Tensor& out, int64_t shard, int64_t words, int64_t numel, const OptionalTensor& error) {
  check_flat(out, at::kInt, "the mean");
  TORCH_CHECK_VALUE(out.numel() == words, "the mean must hold ", words, " words, but it holds ", out.numel(),
                    ": allocate it with that size.");
  TORCH_CHECK_VALUE(numel >= 0 && numel <= shard, "numel is ", numel, ", but the shard has ", shard,
                    " elements: pass how many of them exist.");
  if (error) {
    check_flat(*error, at::kFloat, "the error feedback");
    check_same_device(*error, out, "the error feedback", "the mean");
    TORCH_CHECK_VALUE(error->numel() == numel, "the error feedback has ", error->numel(), " elements but ",
                      numel, " of the shard exist: make them equally long.");
  }
}

}  // namespace dear::compress::ops
