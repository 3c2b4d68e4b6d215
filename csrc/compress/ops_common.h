// What the operators on CPU and on CUDA tensors share.
#pragma once

#include <ATen/core/Tensor.h>

#include "compress/layout.h"
#include "compress/ops_checks.h"

// Every operator that has a kernel for each device: ops_cpu.cpp and ops_cuda.cpp define a function of each
// name.
// clang-format off
#define DEAR_FOR_EACH_OPERATOR(visit) \
  visit(error_correct) \
  visit(sign_encode) \
  visit(sign_vote) \
  visit(sign_average) \
  visit(sign_decode) \
  visit(topk_threshold) \
  visit(topk_refresh) \
  visit(topk_select) \
  visit(topk_accumulate) \
  visit(topk_decode) \
  visit(low_rank_project) \
  visit(low_rank_decode) \
  visit(gather_segments) \
  visit(scatter_segments) \
  visit(orthogonalize)
// clang-format on

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
inline const Segment* segments_of(const at::Tensor& table) {
  static_assert(sizeof(Segment) == 3 * sizeof(int64_t));
  return reinterpret_cast<const Segment*>(table.const_data_ptr<int64_t>());
}
// By how many elements a threshold may miss k and yet be kept.
inline int64_t slack_of(double tolerance, int64_t k) {
  return static_cast<int64_t>(tolerance * static_cast<double>(k));
}
inline int64_t capacity_of(const at::Tensor& slots) { return (slots.size(1) - kSlotHeader) / 2; }

}  // namespace dear::compress
