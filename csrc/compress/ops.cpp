// The operators' names and types, what they do on meta tensors, and the way to them from C++.
#include "compress/ops.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "compress/layout.h"
#include "compress/ops_checks.h"

namespace dear::compress {

namespace {

// at::parallel_for is a template: without OpenMP at the build of this module it runs on one thread, and says
// nothing.
int64_t kernel_threads() {
#ifdef INTRA_OP_PARALLEL
  return at::get_num_threads();
#else
  return 1;
#endif
}

}  // namespace

TORCH_LIBRARY(dear, m) {
  m.def("error_correct(Tensor grad, Tensor(a!) error, Tensor(b!)? dropped) -> ()");

  m.def(
      "sign_encode(Tensor grad, Tensor(a!)? error, Tensor(b!) payload, Tensor(c!)? dropped, bool scaled) -> "
      "()");
  m.def("sign_vote(Tensor payloads, Tensor(a!) out, int tie_breaker) -> ()");
  m.def("sign_average(Tensor payloads, Tensor(a!)? error, Tensor(b!) out, int numel) -> ()");
  m.def("sign_decode(Tensor payload, Tensor(a!) out) -> ()");

  m.def(
      "topk_threshold(Tensor? grad, Tensor error, int k, Tensor(a!) threshold, Tensor(b!) ties, "
      "Tensor(c!) workspace) -> ()");
  m.def(
      "topk_refresh(Tensor? grad, Tensor error, int k, Tensor(a!) threshold, Tensor(b!) ties, "
      "Tensor(c!) workspace, float tolerance) -> ()");
  m.def(
      "topk_select(Tensor? grad, Tensor(a!) error, Tensor threshold, Tensor? ties, int shard_numel, "
      "Tensor(b!) payload, Tensor(c!) stats, Tensor(d!) workspace) -> ()");
  m.def("topk_accumulate(Tensor payloads, Tensor(a!) dense, float alpha) -> ()");
  m.def("topk_decode(Tensor payloads, Tensor(a!) out, int shard_numel, float alpha) -> ()");

  m.def(
      "low_rank_project(Tensor? grad, Tensor(a!) error, Tensor fixed, Tensor(b!) factor, Tensor? starts, "
      "bool transposed, bool residual, Tensor(c!)? dropped) -> ()");
  m.def("low_rank_decode(Tensor p, Tensor q, Tensor(a!) out, Tensor starts) -> ()");
  m.def("gather_segments(Tensor source, Tensor table, Tensor(a!) message, Tensor(b!)? dropped) -> ()");
  m.def("scatter_segments(Tensor message, Tensor table, Tensor(a!) out) -> ()");
  m.def("orthogonalize(Tensor(a!) matrices, Tensor(b!) workspace) -> ()");

  m.def("kernel_threads() -> int", &kernel_threads);
}

namespace {

using at::Tensor;
using Optional = OptionalTensor;

bool symbolic(const Tensor& tensor) { return tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides(); }
bool symbolic(const Optional& tensor) { return tensor && symbolic(*tensor); }
template <typename T>
bool symbolic(const T&) {
  return false;
}

// Nothing is returned and no shape depends on data: on meta tensors an operator is its checks. Symbolic
// sizes, which a compiler traces with, are left to the checks of the real call.
template <auto check, typename... Args>
void meta(Args... args) {
  if (!(symbolic(args) || ...)) check(args...);
}

// Operators with arguments that no check looks at.
void check_encode(const Tensor& grad, const Optional& error, const Tensor& payload, const Optional& dropped,
                  bool) {
  check_sign_encode(grad, error, payload, dropped);
}
void check_accumulate(const Tensor& payloads, const Tensor& dense, double) {
  check_topk_accumulate(payloads, dense);
}
void check_decode(const Tensor& payloads, const Tensor& out, int64_t shard_numel, double) {
  check_topk_decode(payloads, out, shard_numel);
}

void check_project(const Optional& grad, const Tensor& error, const Tensor& fixed, const Tensor& factor,
                   const Optional& starts, bool transposed, bool, const Optional& dropped) {
  check_low_rank_project(grad, error, fixed, factor, starts, transposed, dropped);
}

}  // namespace

TORCH_LIBRARY_IMPL(dear, Meta, m) {
  m.impl("error_correct", meta<check_error_correct, const Tensor&, const Tensor&, const Optional&>);
  m.impl("sign_encode",
         meta<check_encode, const Tensor&, const Optional&, const Tensor&, const Optional&, bool>);
  m.impl("sign_vote", meta<check_sign_vote, const Tensor&, const Tensor&, int64_t>);
  m.impl("sign_average", meta<check_sign_average, const Tensor&, const Optional&, const Tensor&, int64_t>);
  m.impl("sign_decode", meta<check_sign_decode, const Tensor&, const Tensor&>);
  m.impl("topk_threshold", meta<check_topk_threshold, const Optional&, const Tensor&, int64_t, const Tensor&,
                                const Tensor&, const Tensor&>);
  m.impl("topk_refresh", meta<check_topk_refresh, const Optional&, const Tensor&, int64_t, const Tensor&,
                              const Tensor&, const Tensor&, double>);
  m.impl("topk_select", meta<check_topk_select, const Optional&, const Tensor&, const Tensor&,
                             const Optional&, int64_t, const Tensor&, const Tensor&, const Tensor&>);
  m.impl("topk_accumulate", meta<check_accumulate, const Tensor&, const Tensor&, double>);
  m.impl("topk_decode", meta<check_decode, const Tensor&, const Tensor&, int64_t, double>);
  m.impl("low_rank_project", meta<check_project, const Optional&, const Tensor&, const Tensor&, const Tensor&,
                                  const Optional&, bool, bool, const Optional&>);
  m.impl("low_rank_decode",
         meta<check_low_rank_decode, const Tensor&, const Tensor&, const Tensor&, const Tensor&>);
  m.impl("gather_segments",
         meta<check_gather_segments, const Tensor&, const Tensor&, const Tensor&, const Optional&>);
  m.impl("scatter_segments", meta<check_scatter_segments, const Tensor&, const Tensor&, const Tensor&>);
  m.impl("orthogonalize", meta<check_orthogonalize, const Tensor&, const Tensor&>);
}

namespace ops {

namespace {

template <typename... Args>
auto find(const char* name, void (*)(Args...)) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<void(Args...)>();
}

}  // namespace

void error_correct(const at::Tensor& grad, const at::Tensor& error, const OptionalTensor& dropped) {
  static const auto op = find("dear::error_correct", &error_correct);
  op.call(grad, error, dropped);
}

void sign_encode(const at::Tensor& grad, const OptionalTensor& error, const at::Tensor& payload,
                 const OptionalTensor& dropped, bool scaled) {
  static const auto op = find("dear::sign_encode", &sign_encode);
  op.call(grad, error, payload, dropped, scaled);
}

void sign_vote(const at::Tensor& payloads, const at::Tensor& out, int64_t tie_breaker) {
  static const auto op = find("dear::sign_vote", &sign_vote);
  op.call(payloads, out, tie_breaker);
}

void sign_average(const at::Tensor& payloads, const OptionalTensor& error, const at::Tensor& out,
                  int64_t numel) {
  static const auto op = find("dear::sign_average", &sign_average);
  op.call(payloads, error, out, numel);
}

void sign_decode(const at::Tensor& payload, const at::Tensor& out) {
  static const auto op = find("dear::sign_decode", &sign_decode);
  op.call(payload, out);
}

void topk_threshold(const OptionalTensor& grad, const at::Tensor& error, int64_t k,
                    const at::Tensor& threshold, const at::Tensor& ties, const at::Tensor& workspace) {
  static const auto op = find("dear::topk_threshold", &topk_threshold);
  op.call(grad, error, k, threshold, ties, workspace);
}

void topk_refresh(const OptionalTensor& grad, const at::Tensor& error, int64_t k, const at::Tensor& threshold,
                  const at::Tensor& ties, const at::Tensor& workspace, double tolerance) {
  static const auto op = find("dear::topk_refresh", &topk_refresh);
  op.call(grad, error, k, threshold, ties, workspace, tolerance);
}

void topk_select(const OptionalTensor& grad, const at::Tensor& error, const at::Tensor& threshold,
                 const OptionalTensor& ties, int64_t shard_numel, const at::Tensor& payload,
                 const at::Tensor& stats, const at::Tensor& workspace) {
  static const auto op = find("dear::topk_select", &topk_select);
  op.call(grad, error, threshold, ties, shard_numel, payload, stats, workspace);
}

void topk_accumulate(const at::Tensor& payloads, const at::Tensor& dense, double alpha) {
  static const auto op = find("dear::topk_accumulate", &topk_accumulate);
  op.call(payloads, dense, alpha);
}

void topk_decode(const at::Tensor& payloads, const at::Tensor& out, int64_t shard_numel, double alpha) {
  static const auto op = find("dear::topk_decode", &topk_decode);
  op.call(payloads, out, shard_numel, alpha);
}

void low_rank_project(const OptionalTensor& grad, const at::Tensor& error, const at::Tensor& fixed,
                      const at::Tensor& factor, const OptionalTensor& starts, bool transposed, bool residual,
                      const OptionalTensor& dropped) {
  static const auto op = find("dear::low_rank_project", &low_rank_project);
  op.call(grad, error, fixed, factor, starts, transposed, residual, dropped);
}

void low_rank_decode(const at::Tensor& p, const at::Tensor& q, const at::Tensor& out,
                     const at::Tensor& starts) {
  static const auto op = find("dear::low_rank_decode", &low_rank_decode);
  op.call(p, q, out, starts);
}

void gather_segments(const at::Tensor& source, const at::Tensor& table, const at::Tensor& message,
                     const OptionalTensor& dropped) {
  static const auto op = find("dear::gather_segments", &gather_segments);
  op.call(source, table, message, dropped);
}

void scatter_segments(const at::Tensor& message, const at::Tensor& table, const at::Tensor& out) {
  static const auto op = find("dear::scatter_segments", &scatter_segments);
  op.call(message, table, out);
}

void orthogonalize(const at::Tensor& matrices, const at::Tensor& workspace) {
  static const auto op = find("dear::orthogonalize", &orthogonalize);
  op.call(matrices, workspace);
}

int64_t topk_workspace(int64_t numel) { return block_count(numel) * (kBlockWords + 2) + kHistogramWords; }

int64_t orthogonalize_workspace(int64_t batch, int64_t rows, int64_t columns) {
  return batch * ((ceil_div(rows, kGramRows) + 1) * padded_rank(columns) * padded_rank(columns) + 1);
}

}  // namespace ops

}  // namespace dear::compress
