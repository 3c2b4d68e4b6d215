#include "compress/ops/low_rank.h"

#include <c10/util/Exception.h>

#include "compress/kernels/cpu/low_rank.h"
#include "compress/kernels/cpu/orthogonalize.h"
#include "compress/ops/operator.h"
#ifdef DEAR_CUDA_KERNELS
#include <ATen/ops/bmm.h>

#include "compress/kernels/cuda/low_rank.h"
#include "compress/kernels/cuda/low_rank_sweep.h"
#include "compress/kernels/cuda/orthogonalize.h"
#include "compress/ops/launch.h"
#endif

namespace dear::compress::ops {

namespace {

// A factor of a batch of matrices: [count, length, rank].
void check_factor(const Tensor& factor, const Tensor& data, int64_t count, int64_t length, int64_t rank,
                  const char* name) {
  check_flat(factor, at::kFloat, name);
  check_same_device(factor, data, name, "the matrices");
  TORCH_CHECK_VALUE(
      factor.dim() == 3 && factor.size(0) == count && factor.size(1) == length && factor.size(2) == rank,
      name, " must be [", count, ", ", length, ", ", rank, "], but it is ", factor.sizes(),
      ": allocate it with that shape.");
}

void check_rank(int64_t rank) {
  TORCH_CHECK_VALUE(rank >= 1 && rank <= kMaxRank, "the rank is ", rank, ", but it must lie between 1 and ",
                    kMaxRank, ": use such a rank.");
}

// The table of where the matrices of a batch begin in the gradient, which lies on the host.
const int64_t* starts_within(const Tensor& table, const BatchShape& batch, int64_t numel) {
  const int64_t* starts = table.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < batch.count; ++i) {
    TORCH_CHECK_VALUE(starts[i] >= 0 && starts[i] <= numel - batch.numel(), "a matrix of ", batch.numel(),
                      " elements begins at ", starts[i], " of a gradient of ", numel,
                      " elements: pass the starts of this gradient.");
  }
  return starts;
}

const float* factor_or_null(const OptionalTensor& factor) {
  return factor ? factor->const_data_ptr<float>() : nullptr;
}

struct LowRankProject {
  static constexpr auto schema =
      "low_rank_project(Tensor? grad, Tensor(a!) error, Tensor fixed, Tensor(b!) factor, Tensor? starts, "
      "bool transposed, bool residual, Tensor(c!)? dropped, Tensor? pending_p, Tensor? pending_q) -> ()";

  static void check(const OptionalTensor& grad, const Tensor& error, const Tensor& fixed,
                    const Tensor& factor, const OptionalTensor& starts, bool transposed, bool,
                    const OptionalTensor& dropped, const OptionalTensor& pending_p,
                    const OptionalTensor& pending_q) {
    check_flat(error, at::kFloat, "the error feedback");
    TORCH_CHECK_VALUE(error.dim() == 3, "the error feedback must be [matrices, rows, columns], but it is ",
                      error.sizes(), ": view it in that shape.");
    TORCH_CHECK_VALUE(
        grad.has_value() == starts.has_value(),
        "a gradient and the table of where its matrices begin need each other: pass both or none.");
    if (grad) {
      check_grad(*grad);
      check_same_device(error, *grad, "the error feedback", "the gradient");
      check_table(*starts, error.size(0), *grad, "the table of starts");
    }
    TORCH_CHECK_VALUE(fixed.dim() == 3, "a factor must be [matrices, length, rank], but it is ",
                      fixed.sizes(), ": view it in that shape.");
    check_rank(fixed.size(2));
    const int64_t known = transposed ? 1 : 2;
    check_factor(fixed, error, error.size(0), error.size(known), fixed.size(2), "the fixed factor");
    check_factor(factor, error, error.size(0), error.size(3 - known), fixed.size(2), "the new factor");
    TORCH_CHECK_VALUE(pending_p.has_value() == pending_q.has_value(),
                      "the pending factors need each other: pass both or none.");
    if (pending_p) {
      check_factor(*pending_p, error, error.size(0), error.size(1), fixed.size(2), "the pending P");
      check_factor(*pending_q, error, error.size(0), error.size(2), fixed.size(2), "the pending Q");
    }
    check_dropped(dropped, error);
  }
  static void cpu(const OptionalTensor& grad, const Tensor& error, const Tensor& fixed, const Tensor& factor,
                  const OptionalTensor& starts, bool transposed, bool residual, const OptionalTensor& dropped,
                  const OptionalTensor& pending_p, const OptionalTensor& pending_q) {
    const BatchShape batch{error.size(0), error.size(1), error.size(2), fixed.size(2)};
    const cpu::Projection projection{data_or_null(grad),
                                     type_or_float(grad),
                                     grad ? starts_within(*starts, batch, grad->numel()) : nullptr,
                                     floats(error),
                                     fixed.const_data_ptr<float>(),
                                     floats(factor),
                                     residual,
                                     factor_or_null(pending_p),
                                     factor_or_null(pending_q)};
    add_count(dropped, cpu::low_rank_project(batch, projection, transposed));
  }
#ifdef DEAR_CUDA_KERNELS
  static void cuda(const OptionalTensor& grad, const Tensor& error, const Tensor& fixed, const Tensor& factor,
                   const OptionalTensor& starts, bool transposed, bool residual,
                   const OptionalTensor& dropped, const OptionalTensor& pending_p,
                   const OptionalTensor& pending_q) {
    const BatchShape batch{error.size(0), error.size(1), error.size(2), fixed.size(2)};
    const Launch launch(error);
    const cuda::Sweep sweep{data_or_null(grad),
                            type_or_float(grad),
                            grad ? grad->numel() : 0,
                            grad ? starts->const_data_ptr<int64_t>() : nullptr,
                            floats(error),
                            factor_or_null(pending_p),
                            factor_or_null(pending_q),
                            words_or_null(dropped)};
    if (cuda::sweeps_at_once(batch, transposed)) {
      cuda::low_rank_sweep(batch, sweep, fixed.const_data_ptr<float>(), floats(factor), transposed,
                           launch.stream());
      launch.check();
    } else {
      if (grad || pending_p) cuda::correct_matrices(batch, sweep, launch.stream());
      launch.check();
      Tensor product = factor;
      at::bmm_out(product, transposed ? error.transpose(1, 2) : error, fixed);
      cuda::limit_factor(floats(factor), factor.numel(), words_or_null(dropped), launch.stream());
      launch.check();
    }
    if (residual) {
      const Tensor& p = transposed ? fixed : factor;
      const Tensor& q = transposed ? factor : fixed;
      cuda::low_rank_subtract(batch, p.const_data_ptr<float>(), q.const_data_ptr<float>(), floats(error),
                              words_or_null(dropped), launch.stream());
      launch.check();
    }
  }
#endif
};

struct LowRankSubtract {
  static constexpr auto schema =
      "low_rank_subtract(Tensor(a!) error, Tensor p, Tensor q, Tensor(b!)? dropped) -> ()";

  static void check(const Tensor& error, const Tensor& p, const Tensor& q, const OptionalTensor& dropped) {
    check_flat(error, at::kFloat, "the error feedback");
    TORCH_CHECK_VALUE(
        error.dim() == 3 && p.dim() == 3,
        "the error feedback must be [matrices, rows, columns] and P [matrices, rows, rank], but "
        "they are ",
        error.sizes(), " and ", p.sizes(), ": view them in that shape.");
    check_rank(p.size(2));
    check_factor(p, error, error.size(0), error.size(1), p.size(2), "P");
    check_factor(q, error, error.size(0), error.size(2), p.size(2), "Q");
    check_dropped(dropped, error);
  }
  static void cpu(const Tensor& error, const Tensor& p, const Tensor& q, const OptionalTensor& dropped) {
    const BatchShape batch{error.size(0), error.size(1), error.size(2), p.size(2)};
    add_count(dropped, cpu::low_rank_subtract(batch, p.const_data_ptr<float>(), q.const_data_ptr<float>(),
                                              floats(error)));
  }
#ifdef DEAR_CUDA_KERNELS
  static void cuda(const Tensor& error, const Tensor& p, const Tensor& q, const OptionalTensor& dropped) {
    const BatchShape batch{error.size(0), error.size(1), error.size(2), p.size(2)};
    const Launch launch(error);
    cuda::low_rank_subtract(batch, p.const_data_ptr<float>(), q.const_data_ptr<float>(), floats(error),
                            words_or_null(dropped), launch.stream());
    launch.check();
  }
#endif
};

struct LowRankDecode {
  static constexpr auto schema = "low_rank_decode(Tensor p, Tensor q, Tensor(a!) out, Tensor starts) -> ()";

  static void check(const Tensor& p, const Tensor& q, const Tensor& out, const Tensor& starts) {
    check_grad(out);
    TORCH_CHECK_VALUE(p.dim() == 3 && q.dim() == 3, "factors must be [matrices, length, rank], but they are ",
                      p.sizes(), " and ", q.sizes(), ": view them in that shape.");
    check_rank(p.size(2));
    check_factor(p, out, p.size(0), p.size(1), p.size(2), "P");
    check_factor(q, out, p.size(0), q.size(1), p.size(2), "Q");
    check_table(starts, p.size(0), out, "the table of starts");
  }
  static void cpu(const Tensor& p, const Tensor& q, const Tensor& out, const Tensor& starts) {
    const BatchShape batch{p.size(0), p.size(1), q.size(1), p.size(2)};
    cpu::low_rank_decode(batch, p.const_data_ptr<float>(), q.const_data_ptr<float>(),
                         starts_within(starts, batch, out.numel()), grad_type(out), out.mutable_data_ptr());
  }
#ifdef DEAR_CUDA_KERNELS
  static void cuda(const Tensor& p, const Tensor& q, const Tensor& out, const Tensor& starts) {
    const BatchShape batch{p.size(0), p.size(1), q.size(1), p.size(2)};
    const Launch launch(out);
    cuda::low_rank_decode(batch, p.const_data_ptr<float>(), q.const_data_ptr<float>(),
                          starts.const_data_ptr<int64_t>(), grad_type(out), out.mutable_data_ptr(),
                          out.numel(), launch.stream());
    launch.check();
  }
#endif
};

struct Orthogonalize {
  static constexpr auto schema = "orthogonalize(Tensor(a!) matrices, Tensor(b!) workspace) -> ()";

  static void check(const Tensor& matrices, const Tensor& workspace) {
    check_flat(matrices, at::kFloat, "the matrices");
    TORCH_CHECK_VALUE(matrices.dim() == 3 && matrices.size(2) >= 1 && matrices.size(2) <= matrices.size(1),
                      "orthogonalize needs [batch, rows, columns] with 1 <= columns <= rows, but got ",
                      matrices.sizes(), ": use a rank no larger than the matrix.");
    check_rank(matrices.size(2));
    check_workspace(workspace, at::kDouble,
                    orthogonalize_workspace_numel(matrices.size(0), matrices.size(1), matrices.size(2)),
                    matrices);
  }
  static void cpu(const Tensor& matrices, const Tensor& workspace) {
    cpu::orthogonalize(floats(matrices), matrices.size(0), matrices.size(1), matrices.size(2),
                       workspace.mutable_data_ptr<double>());
  }
#ifdef DEAR_CUDA_KERNELS
  static void cuda(const Tensor& matrices, const Tensor& workspace) {
    // The kernels read it two at once.
    TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(workspace.const_data_ptr()) % (2 * sizeof(double)) == 0,
                      "the workspace must begin at a multiple of 16 bytes: allocate it for itself.");
    const Launch launch(matrices);
    cuda::orthogonalize(floats(matrices), matrices.size(0), matrices.size(1), matrices.size(2),
                        workspace.mutable_data_ptr<double>(), launch.stream());
    launch.check();
  }
#endif
};

}  // namespace

void low_rank_project(const OptionalTensor& grad, const Tensor& error, const Tensor& fixed,
                      const Tensor& factor, const OptionalTensor& starts, bool transposed, bool residual,
                      const OptionalTensor& dropped, const OptionalTensor& pending_p,
                      const OptionalTensor& pending_q) {
  call<LowRankProject>(grad, error, fixed, factor, starts, transposed, residual, dropped, pending_p,
                       pending_q);
}

void low_rank_subtract(const Tensor& error, const Tensor& p, const Tensor& q, const OptionalTensor& dropped) {
  call<LowRankSubtract>(error, p, q, dropped);
}

void low_rank_decode(const Tensor& p, const Tensor& q, const Tensor& out, const Tensor& starts) {
  call<LowRankDecode>(p, q, out, starts);
}

void orthogonalize(const Tensor& matrices, const Tensor& workspace) {
  call<Orthogonalize>(matrices, workspace);
}

TORCH_LIBRARY_FRAGMENT(dear, m) {
  define<LowRankProject>(m);
  define<LowRankSubtract>(m);
  define<LowRankDecode>(m);
  define<Orthogonalize>(m);
}

}  // namespace dear::compress::ops
