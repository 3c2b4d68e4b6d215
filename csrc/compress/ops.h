// The compression operators for C++ callers. Each goes through torch's dispatcher, so the tensor's device
// picks the kernel; compress/ops.py documents shapes, types and semantics, which are the same here.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace dear::compress::ops {

using OptionalTensor = std::optional<at::Tensor>;

void error_correct(const at::Tensor& grad, const at::Tensor& error, const OptionalTensor& dropped);

void sign_encode(const at::Tensor& grad, const OptionalTensor& error, const at::Tensor& payload,
                 const OptionalTensor& dropped, bool scaled);
void sign_vote(const at::Tensor& payloads, const at::Tensor& out, int64_t tie_breaker);
void sign_average(const at::Tensor& payloads, const OptionalTensor& error, const at::Tensor& out,
                  int64_t numel);
void sign_decode(const at::Tensor& payload, const at::Tensor& out);

void topk_threshold(const OptionalTensor& grad, const at::Tensor& error, int64_t k,
                    const at::Tensor& threshold, const at::Tensor& ties, const at::Tensor& workspace);
void topk_refresh(const OptionalTensor& grad, const at::Tensor& error, int64_t k, const at::Tensor& threshold,
                  const at::Tensor& ties, const at::Tensor& workspace, double tolerance);
void topk_select(const OptionalTensor& grad, const at::Tensor& error, const at::Tensor& threshold,
                 const OptionalTensor& ties, int64_t shard_numel, const at::Tensor& payload,
                 const at::Tensor& stats, const at::Tensor& workspace);
void topk_accumulate(const at::Tensor& payloads, const at::Tensor& dense, double alpha);
void topk_decode(const at::Tensor& payloads, const at::Tensor& out, int64_t shard_numel, double alpha);

void low_rank_project(const OptionalTensor& grad, const at::Tensor& error, const at::Tensor& fixed,
                      const at::Tensor& factor, const OptionalTensor& starts, bool transposed, bool residual,
                      const OptionalTensor& dropped);
void low_rank_decode(const at::Tensor& p, const at::Tensor& q, const at::Tensor& out,
                     const at::Tensor& starts);
void gather_segments(const at::Tensor& source, const at::Tensor& table, const at::Tensor& message,
                     const OptionalTensor& dropped);
void scatter_segments(const at::Tensor& message, const at::Tensor& table, const at::Tensor& out);
void orthogonalize(const at::Tensor& matrices, const at::Tensor& workspace);

// Elements of workspace the operators above need: int32 for top-k, float64 for orthogonalize.
int64_t topk_workspace(int64_t numel);
int64_t orthogonalize_workspace(int64_t batch, int64_t rows, int64_t columns);

}  // namespace dear::compress::ops
