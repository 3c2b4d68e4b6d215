#pragma once

#include <ATen/ThreadLocalState.h>

#include <optional>

namespace dear {

// The context of whoever submitted an exchange, for what is left to whoever waits.
//
// Note [Whose context]
// A read of a parameter may come from anywhere: with fake tensors, inside a functorch transform, under
// autocast. Operators that it calls there may compute something else, or nothing at all. What a wait has to
// compute (it divides a sum, takes it from its staging buffers, decodes it) belongs to the step that
// submitted the exchange, and so runs in the modes of the thread that did. dear/_context.py is the same for
// updates.
class Submitter {
 public:
  void remember() { context_.emplace(); }
  // Runs `work` in that context, and forgets it.
  template <typename Work>
  void run(Work work) {
    if (!context_) return work();
    const at::ThreadLocalState context = std::move(*context_);
    context_.reset();
    const at::ThreadLocalStateGuard guard(context);
    work();
  }

 private:
  std::optional<at::ThreadLocalState> context_;
};

}  // namespace dear
