#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <cstdint>
#include <memory>
#include <torch/csrc/distributed/c10d/reducer.hpp>
#include <utility>
#include <vector>

#include "schedule/scheduler.h"

namespace dear {

// Which gradients are this rank's own, since the reducer was not prepared for the backward pass that made
// them: its forward pass went past the DDP module, or ran under no_sync(). A hook of autograd's on each
// parameter notes the tensor that was added to; whoever puts another one into .grad has made it his own.
class Unreduced {
 public:
  // `params` require a gradient. The hooks go with this object.
  Unreduced(const std::vector<at::Tensor>& params, const std::shared_ptr<c10d::Reducer>& reducer,
            std::shared_ptr<Scheduler> scheduler);
  ~Unreduced();
  Unreduced(const Unreduced&) = delete;
  Unreduced& operator=(const Unreduced&) = delete;

  // Whether that is what stands in the .grad of parameter `index`, and no backward pass has been reduced
  // since.
  bool has(size_t index) const;

 private:
  struct Noted;
  std::shared_ptr<Noted> noted_;
  // Which pointer it is depends on torch's version.
  using Accumulator = decltype(torch::autograd::impl::grad_accumulator(std::declval<const at::Tensor&>()));
  std::vector<std::pair<Accumulator, uintptr_t>> hooks_;
};

}  // namespace dear
