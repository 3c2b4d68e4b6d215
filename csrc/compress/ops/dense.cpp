#include "compress/ops/dense.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "compress/kernels/cpu/dense.h"
#include "compress/ops/operator.h"
#ifdef DEAR_CUDA_KERNELS
#include "compress/kernels/cuda/dense.h"
#include "compress/ops/launch.h"
#endif

namespace dear::compress::ops {

namespace {

struct DenseRound {
  static constexpr auto schema =
      "dense_round(Tensor grad, Tensor(a!)? error, Tensor(b!) out, Tensor(c!)? dropped) -> ()";

  static void check(const Tensor& grad, const OptionalTensor& error, const Tensor& out,
                    const OptionalTensor& dropped) {
    check_grad(grad);
    TORCH_CHECK_TYPE(out.scalar_type() == at::kHalf || out.scalar_type() == at::kBFloat16,
                     "the rounded gradient must be Half or BFloat16, but it is ", out.scalar_type(),
                     ": choose one of these.");
    check_same_device(out, grad, "the rounded gradient", "the gradient");
    TORCH_CHECK_VALUE(out.is_contiguous() && out.numel() == grad.numel(), "the rounded gradient must hold ",
                      grad.numel(), " elements, packed, but it is ", out.sizes(),
                      ": allocate it with that size.");
    if (error) check_error(*error, grad);
    check_dropped(dropped, grad);
  }
  static void cpu(const Tensor& grad, const OptionalTensor& error, const Tensor& out,
                  const OptionalTensor& dropped) {
    add_count(dropped, cpu::dense_round(grad.const_data_ptr(), grad_type(grad), floats_or_null(error),
                                        grad.numel(), grad_type(out), out.mutable_data_ptr()));
  }
#ifdef DEAR_CUDA_KERNELS
  static void cuda(const Tensor& grad, const OptionalTensor& error, const Tensor& out,
                   const OptionalTensor& dropped) {
    const Launch launch(grad);
    cuda::dense_round(grad.const_data_ptr(), grad_type(grad), floats_or_null(error), grad.numel(),
                      grad_type(out), out.mutable_data_ptr(), words_or_null(dropped), launch.stream());
    launch.check();
  }
#endif
};

struct DenseAverage {
  static constexpr auto schema =
      "dense_average(Tensor payloads, Tensor(a!)? error, Tensor(b!) out, Tensor(c!)? dropped) -> ()";

  static void check(const Tensor& payloads, const OptionalTensor& error, const Tensor& out,
                    const OptionalTensor& dropped) {
    DenseRound::check(out, error, out, dropped);
    check_same_device(payloads, out, "the payloads", "their mean");
    TORCH_CHECK_TYPE(payloads.scalar_type() == out.scalar_type(), "the payloads are ", payloads.scalar_type(),
                     " but their mean is ", out.scalar_type(), ": make them of one type.");
    TORCH_CHECK_VALUE(payloads.dim() == 2 && payloads.size(0) >= 1 && payloads.size(1) == out.numel() &&
                          (payloads.size(1) <= 1 || payloads.stride(1) == 1),
                      "the payloads must be [ranks, ", out.numel(), "] with packed rows, but they are ",
                      payloads.sizes(), ": pass the same range of every rank's payload.");
  }
  static void cpu(const Tensor& payloads, const OptionalTensor& error, const Tensor& out,
                  const OptionalTensor& dropped) {
    add_count(dropped, cpu::dense_average(payloads.const_data_ptr(), grad_type(out), payloads.size(0),
                                          payloads.stride(0), floats_or_null(error), out.numel(),
                                          out.mutable_data_ptr()));
  }
#ifdef DEAR_CUDA_KERNELS
  static void cuda(const Tensor& payloads, const OptionalTensor& error, const Tensor& out,
                   const OptionalTensor& dropped) {
    const Launch launch(out);
    cuda::dense_average(payloads.const_data_ptr(), grad_type(out), payloads.size(0), payloads.stride(0),
                        floats_or_null(error), out.numel(), out.mutable_data_ptr(), words_or_null(dropped),
                        launch.stream());
    launch.check();
  }
#endif
};

}  // namespace

void dense_round(const Tensor& grad, const OptionalTensor& error, const Tensor& out,
                 const OptionalTensor& dropped) {
  call<DenseRound>(grad, error, out, dropped);
}

void dense_average(const Tensor& payloads, const OptionalTensor& error, const Tensor& out,
                   const OptionalTensor& dropped) {
  call<DenseAverage>(payloads, error, out, dropped);
}

void dense_decode(const Tensor& rows, int64_t shard, const Tensor& out) {
  const int64_t n = out.numel();
  if (out.is_cpu() && out.scalar_type() == at::kFloat) {
    const Rows owners{rows.size(0), rows.stride(0), shard};
    cpu::dense_decode(rows.const_data_ptr(), grad_type(rows), owners, n, floats(out));
    return;
  }
  for (int64_t owner = 0; owner < rows.size(0); ++owner) {
    const int64_t begin = std::min(owner * shard, n);
    const int64_t size = std::min(shard, n - begin);
    out.narrow(0, begin, size).copy_(rows.select(0, owner).narrow(0, 0, size));
  }
}

TORCH_LIBRARY_FRAGMENT(dear, m) {
  define<DenseRound>(m);
  define<DenseAverage>(m);
}

}  // namespace dear::compress::ops
