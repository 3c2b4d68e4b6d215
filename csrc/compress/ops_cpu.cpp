// The operators on CPU tensors: checks, then the kernel on raw pointers.
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "compress/kernels/cpu/dense.h"
#include "compress/kernels/cpu/error_feedback.h"
#include "compress/kernels/cpu/low_rank.h"
#include "compress/kernels/cpu/orthogonalize.h"
#include "compress/kernels/cpu/segments.h"
#include "compress/kernels/cpu/sign.h"
#include "compress/kernels/cpu/topk.h"
#include "compress/ops_checks.h"
#include "compress/ops_common.h"

namespace dear::compress {

namespace {

// The table of where the matrices of a batch begin in the gradient.
const int64_t* starts_within(const at::Tensor& table, const BatchShape& batch, int64_t numel) {
  const int64_t* starts = table.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < batch.count; ++i) {
    TORCH_CHECK_VALUE(starts[i] >= 0 && starts[i] <= numel - batch.numel(), "a matrix of ", batch.numel(),
                      " elements begins at ", starts[i], " of a gradient of ", numel,
                      " elements: pass the starts of this gradient.");
  }
  return starts;
}

const Segment* segments_within(const at::Tensor& table, const at::Tensor& grad, const at::Tensor& message) {
  const Segment* segments = segments_of(table);
  for (int64_t i = 0; i < table.size(0); ++i) {
    const Segment& segment = segments[i];
    TORCH_CHECK_VALUE(segment.within(grad.numel(), message.numel()), "a segment of ", segment.numel,
                      " elements from ", segment.start, " of a gradient of ", grad.numel(),
                      " does not go to ", segment.position, " of a message of ", message.numel(),
                      ": pass the table of this gradient and message.");
  }
  return segments;
}

void add_count(const OptionalTensor& counter, int64_t count) {
  if (counter) *words(*counter) += static_cast<int32_t>(count);
}

void error_correct(const at::Tensor& grad, const at::Tensor& error, const OptionalTensor& dropped) {
  check_error_correct(grad, error, dropped);
  add_count(dropped, cpu::error_correct(grad.const_data_ptr(), grad_type(grad), floats(error), grad.numel()));
}

void dense_round(const at::Tensor& grad, const OptionalTensor& error, const at::Tensor& out,
                 const OptionalTensor& dropped) {
  check_dense_round(grad, error, out, dropped);
  add_count(dropped, cpu::dense_round(grad.const_data_ptr(), grad_type(grad), floats_or_null(error),
                                      grad.numel(), grad_type(out), out.mutable_data_ptr()));
}

void dense_average(const at::Tensor& payloads, const OptionalTensor& error, const at::Tensor& out,
                   const OptionalTensor& dropped) {
  check_dense_average(payloads, error, out, dropped);
  add_count(dropped, cpu::dense_average(payloads.const_data_ptr(), grad_type(out), payloads.size(0),
                                        payloads.stride(0), floats_or_null(error), out.numel(),
                                        out.mutable_data_ptr()));
}

void sign_encode(const at::Tensor& grad, const OptionalTensor& error, const at::Tensor& payload,
                 const OptionalTensor& dropped, bool scaled) {
  check_sign_encode(grad, error, payload, dropped);
  add_count(dropped, cpu::sign_encode(grad.const_data_ptr(), grad_type(grad), floats_or_null(error),
                                      grad.numel(), words(payload), payload.numel() / kSignRecord, scaled));
}

void sign_vote(const at::Tensor& payloads, const at::Tensor& out, int64_t tie_breaker) {
  check_sign_vote(payloads, out, tie_breaker);
  cpu::sign_vote(payloads.const_data_ptr<int32_t>(), payloads.size(0), payloads.stride(0),
                 out.numel() / kSignRecord, tie_breaker, words(out));
}

void sign_average(const at::Tensor& payloads, const OptionalTensor& error, const at::Tensor& out,
                  int64_t numel) {
  check_sign_average(payloads, error, out, numel);
  cpu::sign_average(payloads.const_data_ptr<int32_t>(), payloads.size(0), payloads.stride(0),
                    out.numel() / kSignRecord, floats_or_null(error), numel, words(out));
}

void sign_decode(const at::Tensor& payload, const at::Tensor& out) {
  check_sign_decode(payload, out);
  cpu::sign_decode(payload.const_data_ptr<int32_t>(), out.numel(), grad_type(out), out.mutable_data_ptr());
}

void topk_threshold(const OptionalTensor& grad, const at::Tensor& error, int64_t k,
                    const at::Tensor& threshold, const at::Tensor& ties, const at::Tensor& workspace) {
  check_topk_threshold(grad, error, k, threshold, ties, workspace);
  cpu::topk_threshold(data_or_null(grad), type_or_float(grad), error.const_data_ptr<float>(), error.numel(),
                      k, floats(threshold), words(ties));
}

void topk_refresh(const OptionalTensor& grad, const at::Tensor& error, int64_t k, const at::Tensor& threshold,
                  const at::Tensor& ties, const at::Tensor& workspace, double tolerance) {
  check_topk_refresh(grad, error, k, threshold, ties, workspace, tolerance);
  cpu::topk_refresh(data_or_null(grad), type_or_float(grad), error.const_data_ptr<float>(), error.numel(), k,
                    slack_of(tolerance, k), floats(threshold), words(ties));
}

void topk_select(const OptionalTensor& grad, const at::Tensor& error, const at::Tensor& threshold,
                 const OptionalTensor& ties, int64_t shard_numel, const at::Tensor& payload,
                 const at::Tensor& stats, const at::Tensor& workspace) {
  check_topk_select(grad, error, threshold, ties, shard_numel, payload, stats, workspace);
  int32_t* masks = words(workspace);
  const auto counts =
      cpu::topk_select(data_or_null(grad), type_or_float(grad), floats(error), error.numel(),
                       *threshold.const_data_ptr<float>(), ties ? *ties->const_data_ptr<int32_t>() : -1,
                       shard_numel, payload.size(0), capacity_of(payload), words(payload), masks,
                       masks + block_count(error.numel()) * kBlockWords);
  words(stats)[0] += static_cast<int32_t>(counts.found);
  words(stats)[1] += static_cast<int32_t>(counts.dropped);
}

void topk_accumulate(const at::Tensor& payloads, const at::Tensor& dense, double alpha) {
  check_topk_accumulate(payloads, dense);
  cpu::topk_accumulate(payloads.const_data_ptr<int32_t>(), payloads.size(0), capacity_of(payloads),
                       static_cast<float>(alpha), floats(dense), dense.numel());
}

void topk_decode(const at::Tensor& payloads, const at::Tensor& out, int64_t shard_numel, double alpha) {
  check_topk_decode(payloads, out, shard_numel);
  cpu::topk_decode(payloads.const_data_ptr<int32_t>(), payloads.size(0), capacity_of(payloads), shard_numel,
                   static_cast<float>(alpha), grad_type(out), out.mutable_data_ptr(), out.numel());
}

void low_rank_project(const OptionalTensor& grad, const at::Tensor& error, const at::Tensor& fixed,
                      const at::Tensor& factor, const OptionalTensor& starts, bool transposed, bool residual,
                      const OptionalTensor& dropped) {
  check_low_rank_project(grad, error, fixed, factor, starts, transposed, dropped);
  const BatchShape batch{error.size(0), error.size(1), error.size(2), fixed.size(2)};
  const cpu::Projection projection{data_or_null(grad),
                                   type_or_float(grad),
                                   grad ? starts_within(*starts, batch, grad->numel()) : nullptr,
                                   floats(error),
                                   fixed.const_data_ptr<float>(),
                                   floats(factor),
                                   residual};
  add_count(dropped, cpu::low_rank_project(batch, projection, transposed));
}

void low_rank_decode(const at::Tensor& p, const at::Tensor& q, const at::Tensor& out,
                     const at::Tensor& starts) {
  check_low_rank_decode(p, q, out, starts);
  const BatchShape batch{p.size(0), p.size(1), q.size(1), p.size(2)};
  cpu::low_rank_decode(batch, p.const_data_ptr<float>(), q.const_data_ptr<float>(),
                       starts_within(starts, batch, out.numel()), grad_type(out), out.mutable_data_ptr());
}

void gather_segments(const at::Tensor& source, const at::Tensor& table, const at::Tensor& message,
                     const OptionalTensor& dropped) {
  check_gather_segments(source, table, message, dropped);
  const Segment* segments = segments_within(table, source, message);
  add_count(dropped, cpu::gather_segments(source.const_data_ptr(), grad_type(source), segments, table.size(0),
                                          floats(message)));
}

void scatter_segments(const at::Tensor& message, const at::Tensor& table, const at::Tensor& out) {
  check_scatter_segments(message, table, out);
  cpu::scatter_segments(message.const_data_ptr<float>(), segments_within(table, out, message), table.size(0),
                        grad_type(out), out.mutable_data_ptr());
}

void orthogonalize(const at::Tensor& matrices, const at::Tensor& workspace) {
  check_orthogonalize(matrices, workspace);
  cpu::orthogonalize(floats(matrices), matrices.size(0), matrices.size(1), matrices.size(2),
                     workspace.mutable_data_ptr<double>());
}

}  // namespace

TORCH_LIBRARY_IMPL(dear, CPU, m) {
#define DEAR_IMPLEMENT(name) m.impl(#name, name);
  DEAR_FOR_EACH_OPERATOR(DEAR_IMPLEMENT)
#undef DEAR_IMPLEMENT
}

}  // namespace dear::compress
