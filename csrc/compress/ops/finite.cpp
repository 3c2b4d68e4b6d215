#include "compress/ops/finite.h"

#include <ATen/ATen.h>

#include "compress/kernels/cpu/finite.h"

namespace dear::compress::ops {

void count_nonfinite(const Tensor& values, const Tensor& count) {
  const at::ScalarType type = values.scalar_type();
  const bool compressible = type == at::kFloat || type == at::kHalf || type == at::kBFloat16;
  if (values.device().is_cpu() && compressible) {
    const int64_t found = cpu::count_nonfinite(values.const_data_ptr(), grad_type(values), values.numel());
    *words(count) = static_cast<int32_t>(found);
  } else {
    count.copy_(values.isfinite().logical_not_().sum());
  }
}

}  // namespace dear::compress::ops
