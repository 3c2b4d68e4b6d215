// What the operators demand of their tensors. The same checks run for CPU, CUDA and meta tensors: they look
// at shapes, types and devices only, never at data.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "compress/layout.h"

namespace dear::compress {

using OptionalTensor = std::optional<at::Tensor>;

GradType grad_type(const at::Tensor& grad);

void check_error_correct(const at::Tensor& grad, const at::Tensor& error, const OptionalTensor& dropped);

void check_sign_encode(const at::Tensor& grad, const OptionalTensor& error, const at::Tensor& payload,
                       const OptionalTensor& dropped);
void check_sign_vote(const at::Tensor& payloads, const at::Tensor& out, int64_t tie_breaker);
void check_sign_average(const at::Tensor& payloads, const OptionalTensor& error, const at::Tensor& out,
                        int64_t numel);
void check_sign_decode(const at::Tensor& payload, const at::Tensor& out);

void check_topk_threshold(const OptionalTensor& grad, const at::Tensor& error, int64_t k,
                          const at::Tensor& threshold, const at::Tensor& ties, const at::Tensor& workspace);
void check_topk_refresh(const OptionalTensor& grad, const at::Tensor& error, int64_t k,
                        const at::Tensor& threshold, const at::Tensor& ties, const at::Tensor& workspace,
                        double tolerance);
void check_topk_select(const OptionalTensor& grad, const at::Tensor& error, const at::Tensor& threshold,
                       const OptionalTensor& ties, int64_t shard_numel, const at::Tensor& payload,
                       const at::Tensor& stats, const at::Tensor& workspace);
void check_topk_accumulate(const at::Tensor& payloads, const at::Tensor& dense);
void check_topk_decode(const at::Tensor& payloads, const at::Tensor& out, int64_t shard_numel);

void check_low_rank_project(const OptionalTensor& grad, const at::Tensor& error, const at::Tensor& fixed,
                            const at::Tensor& factor, const OptionalTensor& starts, bool transposed,
                            const OptionalTensor& dropped);
void check_low_rank_decode(const at::Tensor& p, const at::Tensor& q, const at::Tensor& out,
                           const at::Tensor& starts);

void check_gather_segments(const at::Tensor& source, const at::Tensor& table, const at::Tensor& message,
                           const OptionalTensor& dropped);
void check_scatter_segments(const at::Tensor& message, const at::Tensor& table, const at::Tensor& out);

void check_orthogonalize(const at::Tensor& matrices, const at::Tensor& workspace);

}  // namespace dear::compress
