// What the operators on CPU and on CUDA tensors share.
#pragma once

#include <ATen/core/Tensor.h>

#include "compress/layout.h"
#include "compress/ops_checks.h"

// Every operator that has a kernel for each device: ops_cpu.cpp and ops_cuda.cpp define a function of each
// name.
#define DEAR_FOR_EACH_OPERATOR(visit)                                                             \
  visit(error_correct) visit(sign_encode) visit(sign_vote) visit(sign_average) visit(sign_decode) \
      visit(topk_threshold) visit(topk_select) visit(topk_accumulate) visit(topk_decode)          \
          visit(low_rank_project) visit(low_rank_decode) visit(orthogonalize)

namespace dear::compress {

inline int32_t* words(const at::Tensor& tensor) { return tensor.mutable_data_ptr<int32_t>(); }
inline float* floats(const at::Tensor& tensor) { return tensor.mutable_data_ptr<float>(); }
inline float* floats_or_null(const OptionalTensor& tensor) { return tensor ? floats(*tensor) : nullptr; }
inline const void* data_or_null(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}
inline GradType type_or_float(const OptionalTensor& grad) {
  return grad ? grad_type(*grad) : GradType::kFloat32;
}
inline int64_t capacity_of(const at::Tensor& slots) { return (slots.size(1) - kSlotHeader) / 2; }

}  // namespace dear::compress
