#include "compress/ops/error_feedback.h"

#include "compress/kernels/cpu/error_feedback.h"
#include "compress/ops/operator.h"
#ifdef DEAR_CUDA_KERNELS
#include "compress/kernels/cuda/error_feedback.h"
#include "compress/ops/launch.h"
#endif

namespace dear::compress::ops {

namespace {

struct ErrorCorrect {
  static constexpr auto schema = "error_correct(Tensor grad, Tensor(a!) error, Tensor(b!)? dropped) -> ()";

  static void check(const Tensor& grad, const Tensor& error, const OptionalTensor& dropped) {
    check_grad(grad);
    check_error(error, grad);
    check_dropped(dropped, grad);
  }
  static void cpu(const Tensor& grad, const Tensor& error, const OptionalTensor& dropped) {
    add_count(dropped,
              cpu::error_correct(grad.const_data_ptr(), grad_type(grad), floats(error), grad.numel()));
  }
#ifdef DEAR_CUDA_KERNELS
  static void cuda(const Tensor& grad, const Tensor& error, const OptionalTensor& dropped) {
    const Launch launch(grad);
    cuda::error_correct(grad.const_data_ptr(), grad_type(grad), floats(error), grad.numel(),
                        words_or_null(dropped), launch.stream());
    launch.check();
  }
#endif
};

}  // namespace

void error_correct(const Tensor& grad, const Tensor& error, const OptionalTensor& dropped) {
  call<ErrorCorrect>(grad, error, dropped);
}

TORCH_LIBRARY_FRAGMENT(dear, m) { define<ErrorCorrect>(m); }

}  // namespace dear::compress::ops
