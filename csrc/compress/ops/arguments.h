// What the operators' families share: checks of arguments, each one sentence when it fails, and access to
// data.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "compress/layout.h"

namespace dear::compress::ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// --- checks ---

void check_flat(const Tensor& tensor, at::ScalarType type, const char* name);
void check_same_device(const Tensor& a, const Tensor& b, const char* a_name, const char* b_name);
void check_grad(const Tensor& grad);
void check_error(const Tensor& error, const Tensor& grad);
// An int32 counter of `numel` elements.
void check_counter(const Tensor& counter, int64_t numel, const Tensor& data, const char* name);
void check_dropped(const OptionalTensor& dropped, const Tensor& data);
void check_workspace(const Tensor& workspace, at::ScalarType type, int64_t numel, const Tensor& data);
// An int64 table of `numel` elements.
void check_table(const Tensor& table, int64_t numel, const Tensor& data, const char* name);

// --- data ---

// The type of a gradient; throws for any other type.
GradType grad_type(const Tensor& grad);
inline GradType type_or_float(const OptionalTensor& grad) {
  return grad ? grad_type(*grad) : GradType::kFloat32;
}

inline int32_t* words(const Tensor& tensor) { return tensor.mutable_data_ptr<int32_t>(); }
inline int32_t* words_or_null(const OptionalTensor& tensor) { return tensor ? words(*tensor) : nullptr; }
inline float* floats(const Tensor& tensor) { return tensor.mutable_data_ptr<float>(); }
inline float* floats_or_null(const OptionalTensor& tensor) { return tensor ? floats(*tensor) : nullptr; }
inline const void* data_or_null(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

// Raises a counter on the host.
inline void add_count(const OptionalTensor& counter, int64_t count) {
  if (counter) *words(*counter) += static_cast<int32_t>(count);
}

}  // namespace dear::compress::ops
