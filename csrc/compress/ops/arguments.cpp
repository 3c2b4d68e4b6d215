#include "compress/ops/arguments.h"

#include <c10/util/Exception.h>

#include <limits>

namespace dear::compress::ops {

void check_flat(const Tensor& tensor, at::ScalarType type, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, " must be ", type, ", but it is ",
                   tensor.scalar_type(), ": convert it first.");
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous: pass a flat, packed buffer.");
}

void check_same_device(const Tensor& a, const Tensor& b, const char* a_name, const char* b_name) {
  TORCH_CHECK_VALUE(a.device() == b.device(), a_name, " is on ", a.device(), " but ", b_name, " is on ",
                    b.device(), ": keep them on one device.");
}

void check_grad(const Tensor& grad) {
  grad_type(grad);
  TORCH_CHECK_VALUE(grad.is_contiguous(), "the gradient must be contiguous: pass a flat, packed buffer.");
  TORCH_CHECK_VALUE(grad.numel() <= std::numeric_limits<int32_t>::max(), "the gradient has ", grad.numel(),
                    " elements, more than an int32 index can name: use smaller fusion groups.");
}

void check_error(const Tensor& error, const Tensor& grad) {
  check_flat(error, at::kFloat, "the error feedback");
  check_same_device(error, grad, "the error feedback", "the gradient");
  TORCH_CHECK_VALUE(error.numel() == grad.numel(), "the error feedback has ", error.numel(),
                    " elements but the gradient has ", grad.numel(), ": make them equally long.");
}

void check_counter(const Tensor& counter, int64_t numel, const Tensor& data, const char* name) {
  check_flat(counter, at::kInt, name);
  check_same_device(counter, data, name, "the data");
  TORCH_CHECK_VALUE(counter.numel() == numel, name, " must hold ", numel, " int32, but it holds ",
                    counter.numel(), ": allocate it with that size.");
}

void check_dropped(const OptionalTensor& dropped, const Tensor& data) {
  if (dropped) check_counter(*dropped, 1, data, "the counter of dropped elements");
}

void check_workspace(const Tensor& workspace, at::ScalarType type, int64_t numel, const Tensor& data) {
  check_flat(workspace, type, "the workspace");
  check_same_device(workspace, data, "the workspace", "the data");
  TORCH_CHECK_VALUE(workspace.numel() >= numel, "the workspace has ", workspace.numel(), " elements but ",
                    numel, " are needed: allocate that many.");
}

void check_table(const Tensor& table, int64_t numel, const Tensor& data, const char* name) {
  check_flat(table, at::kLong, name);
  check_same_device(table, data, name, "the data");
  TORCH_CHECK_VALUE(table.numel() == numel, name, " must hold ", numel, " int64, but it holds ",
                    table.numel(), ": pass one entry for each.");
}

GradType grad_type(const Tensor& grad) {
  switch (grad.scalar_type()) {
    case at::kFloat:
      return GradType::kFloat32;
    case at::kHalf:
      return GradType::kFloat16;
    case at::kBFloat16:
      return GradType::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, "gradients must be float32, float16 or bfloat16, but this one is ",
                       grad.scalar_type(), ": convert it, or leave the parameter uncompressed.");
  }
}

}  // namespace dear::compress::ops
