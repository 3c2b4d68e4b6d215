// The operators on CPU tensors: checks, then the kernel on raw pointers.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "compress/kernels/cpu/error_feedback.h"
#include "compress/kernels/cpu/orthogonalize.h"
#include "compress/kernels/cpu/sign.h"
#include "compress/kernels/cpu/topk.h"
#include "compress/ops_checks.h"

namespace dear::compress {

namespace {

int32_t* words(const at::Tensor& tensor) { return tensor.mutable_data_ptr<int32_t>(); }
float* floats(const at::Tensor& tensor) { return tensor.mutable_data_ptr<float>(); }
float* floats_or_null(const OptionalTensor& tensor) { return tensor ? floats(*tensor) : nullptr; }

void add_count(const OptionalTensor& counter, int64_t count) {
  if (counter) *words(*counter) += static_cast<int32_t>(count);
}

void error_correct(const at::Tensor& grad, const at::Tensor& error, const OptionalTensor& dropped) {
  check_error_correct(grad, error, dropped);
  add_count(dropped, cpu::error_correct(grad.const_data_ptr(), grad_type(grad), floats(error), grad.numel()));
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
  cpu::topk_threshold(grad ? grad->const_data_ptr() : nullptr, grad ? grad_type(*grad) : GradType::kFloat32,
                      error.const_data_ptr<float>(), error.numel(), k, floats(threshold), words(ties));
}

void topk_select(const OptionalTensor& grad, const at::Tensor& error, const at::Tensor& threshold,
                 const OptionalTensor& ties, int64_t shard_numel, const at::Tensor& payload,
                 const at::Tensor& stats, const at::Tensor& workspace) {
  check_topk_select(grad, error, threshold, ties, shard_numel, payload, stats, workspace);
  const int64_t capacity = (payload.size(1) - kSlotHeader) / 2;
  int32_t* masks = words(workspace);
  const auto counts =
      cpu::topk_select(grad ? grad->const_data_ptr() : nullptr, grad ? grad_type(*grad) : GradType::kFloat32,
                       floats(error), error.numel(), *threshold.const_data_ptr<float>(),
                       ties ? *ties->const_data_ptr<int32_t>() : -1, shard_numel, payload.size(0), capacity,
                       words(payload), masks, masks + block_count(error.numel()) * kBlockWords);
  words(stats)[0] += static_cast<int32_t>(counts.found);
  words(stats)[1] += static_cast<int32_t>(counts.dropped);
}

void topk_accumulate(const at::Tensor& payloads, const at::Tensor& dense, double alpha) {
  check_topk_accumulate(payloads, dense);
  cpu::topk_accumulate(payloads.const_data_ptr<int32_t>(), payloads.size(0),
                       (payloads.size(1) - kSlotHeader) / 2, static_cast<float>(alpha), floats(dense),
                       dense.numel());
}

void topk_decode(const at::Tensor& payloads, const at::Tensor& out, int64_t shard_numel, double alpha) {
  check_topk_decode(payloads, out, shard_numel);
  cpu::topk_decode(payloads.const_data_ptr<int32_t>(), payloads.size(0), (payloads.size(1) - kSlotHeader) / 2,
                   shard_numel, static_cast<float>(alpha), grad_type(out), out.mutable_data_ptr(),
                   out.numel());
}

void orthogonalize(const at::Tensor& matrices, const at::Tensor& workspace) {
  check_orthogonalize(matrices, workspace);
  cpu::orthogonalize(floats(matrices), matrices.size(0), matrices.size(1), matrices.size(2),
                     workspace.mutable_data_ptr<double>());
}

}  // namespace

TORCH_LIBRARY_IMPL(dear, CPU, m) {
  m.impl("error_correct", error_correct);
  m.impl("sign_encode", sign_encode);
  m.impl("sign_vote", sign_vote);
  m.impl("sign_average", sign_average);
  m.impl("sign_decode", sign_decode);
  m.impl("topk_threshold", topk_threshold);
  m.impl("topk_select", topk_select);
  m.impl("topk_accumulate", topk_accumulate);
  m.impl("topk_decode", topk_decode);
  m.impl("orthogonalize", orthogonalize);
}

}  // namespace dear::compress
