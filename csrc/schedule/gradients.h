#pragma once

#include <ATen/ATen.h>

#include <utility>
#include <vector>

namespace dear {

// What the parameters have in .grad, against what the last backward pass should have left there. One walk a
// step over all of them, with no Python object touched.
class GradientWalk {
 public:
  // Numbers count the pairs of parameters and placeholders, and behind them the idle parameters.
  struct Found {
    bool reduced = false;         // some have the placeholder, or a view of its memory
    bool plain = false;           // some have such a view
    std::vector<size_t> missing;  // have none
    std::vector<size_t> own;      // have anything else, or are idle and have one
  };

  // `idle`: parameters in whose .grad a backward pass has left nothing, as frozen or unused ones.
  GradientWalk(std::vector<std::pair<at::Tensor, at::Tensor>> expected, std::vector<at::Tensor> idle)
      : expected_(std::move(expected)), idle_(std::move(idle)) {}
  Found look() const;

 private:
  const std::vector<std::pair<at::Tensor, at::Tensor>> expected_;
  const std::vector<at::Tensor> idle_;
};

}  // namespace dear
