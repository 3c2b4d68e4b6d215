// In place of the one that launches on a GPU.
#pragma once

#include <ATen/core/Tensor.h>

#include "emulation.h"

namespace dear::compress::ops {

class Launch {
 public:
  explicit Launch(const at::Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
  void check() const {}
};

}  // namespace dear::compress::ops
