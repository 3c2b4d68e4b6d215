// The operators on CUDA tensors: checks, then the kernel on the current stream. Nothing here waits for the
// device.
#ifdef DEAR_WITH_CUDA

#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdint>

#include "compress/kernels/cuda/dense.h"
#include "compress/kernels/cuda/error_feedback.h"
#include "compress/kernels/cuda/low_rank.h"
#include "compress/kernels/cuda/orthogonalize.h"
#include "compress/kernels/cuda/segments.h"
#include "compress/kernels/cuda/sign.h"
#include "compress/kernels/cuda/topk.h"
#include "compress/ops_checks.h"
#include "compress/ops_common.h"

namespace dear::compress {

namespace {

// Makes the tensor's device current, names the stream to launch on, and reports a launch that failed.
class Launch {
 public:
  explicit Launch(const at::Tensor& tensor)
      : guard_(tensor.device()), stream_(c10::cuda::getCurrentCUDAStream(tensor.device().index())) {}
  cudaStream_t stream() const { return stream_; }
  void check() const { C10_CUDA_KERNEL_LAUNCH_CHECK(); }

 private:
  c10::cuda::CUDAGuard guard_;
  c10::cuda::CUDAStream stream_;
};

int32_t* words_or_null(const OptionalTensor& tensor) { return tensor ? words(*tensor) : nullptr; }

void error_correct(const at::Tensor& grad, const at::Tensor& error, const OptionalTensor& dropped) {
  check_error_correct(grad, error, dropped);
  const Launch launch(grad);
  cuda::error_correct(grad.const_data_ptr(), grad_type(grad), floats(error), grad.numel(),
                      words_or_null(dropped), launch.stream());
  launch.check();
}

void dense_round(const at::Tensor& grad, const OptionalTensor& error, const at::Tensor& out,
                 const OptionalTensor& dropped) {
  check_dense_round(grad, error, out, dropped);
  const Launch launch(grad);
  cuda::dense_round(grad.const_data_ptr(), grad_type(grad), floats_or_null(error), grad.numel(),
                    grad_type(out), out.mutable_data_ptr(), words_or_null(dropped), launch.stream());
  launch.check();
}

void dense_average(const at::Tensor& payloads, const OptionalTensor& error, const at::Tensor& out,
                   const OptionalTensor& dropped) {
  check_dense_average(payloads, error, out, dropped);
  const Launch launch(out);
  cuda::dense_average(payloads.const_data_ptr(), grad_type(out), payloads.size(0), payloads.stride(0),
                      floats_or_null(error), out.numel(), out.mutable_data_ptr(), words_or_null(dropped),
                      launch.stream());
  launch.check();
}

void sign_encode(const at::Tensor& grad, const OptionalTensor& error, const at::Tensor& payload,
                 const OptionalTensor& dropped, bool scaled) {
  check_sign_encode(grad, error, payload, dropped);
  const Launch launch(grad);
  cuda::sign_encode(grad.const_data_ptr(), grad_type(grad), floats_or_null(error), grad.numel(),
                    words(payload), payload.numel() / kSignRecord, scaled, words_or_null(dropped),
                    launch.stream());
  launch.check();
}

void sign_vote(const at::Tensor& payloads, const at::Tensor& out, int64_t tie_breaker) {
  check_sign_vote(payloads, out, tie_breaker);
  const Launch launch(out);
  cuda::sign_vote(payloads.const_data_ptr<int32_t>(), payloads.size(0), payloads.stride(0),
                  out.numel() / kSignRecord, tie_breaker, words(out), launch.stream());
  launch.check();
}

void sign_average(const at::Tensor& payloads, const OptionalTensor& error, const at::Tensor& out,
                  int64_t numel) {
  check_sign_average(payloads, error, out, numel);
  const Launch launch(out);
  cuda::sign_average(payloads.const_data_ptr<int32_t>(), payloads.size(0), payloads.stride(0),
                     out.numel() / kSignRecord, floats_or_null(error), numel, words(out), launch.stream());
  launch.check();
}

void sign_decode(const at::Tensor& payload, const at::Tensor& out) {
  check_sign_decode(payload, out);
  const Launch launch(out);
  cuda::sign_decode(payload.const_data_ptr<int32_t>(), out.numel(), grad_type(out), out.mutable_data_ptr(),
                    launch.stream());
  launch.check();
}

void topk_threshold(const OptionalTensor& grad, const at::Tensor& error, int64_t k,
                    const at::Tensor& threshold, const at::Tensor& ties, const at::Tensor& workspace) {
  check_topk_threshold(grad, error, k, threshold, ties, workspace);
  const Launch launch(error);
  cuda::topk_threshold(data_or_null(grad), type_or_float(grad), error.const_data_ptr<float>(), error.numel(),
                       k, floats(threshold), words(ties), words(workspace), launch.stream());
  launch.check();
}

void topk_refresh(const OptionalTensor& grad, const at::Tensor& error, int64_t k, const at::Tensor& threshold,
                  const at::Tensor& ties, const at::Tensor& workspace, double tolerance) {
  check_topk_refresh(grad, error, k, threshold, ties, workspace, tolerance);
  const Launch launch(error);
  cuda::topk_refresh(data_or_null(grad), type_or_float(grad), error.const_data_ptr<float>(), error.numel(), k,
                     slack_of(tolerance, k), floats(threshold), words(ties), words(workspace),
                     launch.stream());
  launch.check();
}

void topk_select(const OptionalTensor& grad, const at::Tensor& error, const at::Tensor& threshold,
                 const OptionalTensor& ties, int64_t shard_numel, const at::Tensor& payload,
                 const at::Tensor& stats, const at::Tensor& workspace) {
  check_topk_select(grad, error, threshold, ties, shard_numel, payload, stats, workspace);
  const Launch launch(error);
  cuda::topk_select(data_or_null(grad), type_or_float(grad), floats(error), error.numel(),
                    threshold.const_data_ptr<float>(), ties ? ties->const_data_ptr<int32_t>() : nullptr,
                    shard_numel, payload.size(0), capacity_of(payload), words(payload), words(stats),
                    words(workspace), launch.stream());
  launch.check();
}

void topk_accumulate(const at::Tensor& payloads, const at::Tensor& dense, double alpha) {
  check_topk_accumulate(payloads, dense);
  const Launch launch(dense);
  cuda::topk_accumulate(payloads.const_data_ptr<int32_t>(), payloads.size(0), capacity_of(payloads),
                        static_cast<float>(alpha), floats(dense), dense.numel(), launch.stream());
  launch.check();
}

void topk_decode(const at::Tensor& payloads, const at::Tensor& out, int64_t shard_numel, double alpha) {
  check_topk_decode(payloads, out, shard_numel);
  const Launch launch(out);
  cuda::topk_decode(payloads.const_data_ptr<int32_t>(), payloads.size(0), capacity_of(payloads), shard_numel,
                    static_cast<float>(alpha), grad_type(out), out.mutable_data_ptr(), out.numel(),
                    launch.stream());
  launch.check();
}

void low_rank_project(const OptionalTensor& grad, const at::Tensor& error, const at::Tensor& fixed,
                      const at::Tensor& factor, const OptionalTensor& starts, bool transposed, bool residual,
                      const OptionalTensor& dropped) {
  check_low_rank_project(grad, error, fixed, factor, starts, transposed, dropped);
  const BatchShape batch{error.size(0), error.size(1), error.size(2), fixed.size(2)};
  const Launch launch(error);
  if (grad) {
    cuda::correct_matrices(batch, grad->const_data_ptr(), grad_type(*grad), grad->numel(),
                           starts->const_data_ptr<int64_t>(), floats(error), words_or_null(dropped),
                           launch.stream());
    launch.check();
  }
  at::Tensor product = factor;
  at::bmm_out(product, transposed ? error.transpose(1, 2) : error, fixed);
  if (residual) {
    const at::Tensor& p = transposed ? fixed : factor;
    const at::Tensor& q = transposed ? factor : fixed;
    cuda::low_rank_subtract(batch, p.const_data_ptr<float>(), q.const_data_ptr<float>(), floats(error),
                            words_or_null(dropped), launch.stream());
    launch.check();
  }
}

void low_rank_decode(const at::Tensor& p, const at::Tensor& q, const at::Tensor& out,
                     const at::Tensor& starts) {
  check_low_rank_decode(p, q, out, starts);
  const BatchShape batch{p.size(0), p.size(1), q.size(1), p.size(2)};
  const Launch launch(out);
  cuda::low_rank_decode(batch, p.const_data_ptr<float>(), q.const_data_ptr<float>(),
                        starts.const_data_ptr<int64_t>(), grad_type(out), out.mutable_data_ptr(), out.numel(),
                        launch.stream());
  launch.check();
}

void gather_segments(const at::Tensor& source, const at::Tensor& table, const at::Tensor& message,
                     const OptionalTensor& dropped) {
  check_gather_segments(source, table, message, dropped);
  const Launch launch(message);
  cuda::gather_segments(source.const_data_ptr(), grad_type(source), source.numel(), segments_of(table),
                        table.size(0), floats(message), message.numel(), words_or_null(dropped),
                        launch.stream());
  launch.check();
}

void scatter_segments(const at::Tensor& message, const at::Tensor& table, const at::Tensor& out) {
  check_scatter_segments(message, table, out);
  const Launch launch(message);
  cuda::scatter_segments(message.const_data_ptr<float>(), message.numel(), segments_of(table), table.size(0),
                         grad_type(out), out.mutable_data_ptr(), out.numel(), launch.stream());
  launch.check();
}

void orthogonalize(const at::Tensor& matrices, const at::Tensor& workspace) {
  check_orthogonalize(matrices, workspace);
  // The kernels read it two at once.
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(workspace.const_data_ptr()) % (2 * sizeof(double)) == 0,
                    "the workspace must begin at a multiple of 16 bytes: allocate it for itself.");
  const Launch launch(matrices);
  cuda::orthogonalize(floats(matrices), matrices.size(0), matrices.size(1), matrices.size(2),
                      workspace.mutable_data_ptr<double>(), launch.stream());
  launch.check();
}

}  // namespace

TORCH_LIBRARY_IMPL(dear, CUDA, m) {
#define DEAR_IMPLEMENT(name) m.impl(#name, name);
  DEAR_FOR_EACH_OPERATOR(DEAR_IMPLEMENT)
#undef DEAR_IMPLEMENT
}

}  // namespace dear::compress

#endif  // DEAR_WITH_CUDA
