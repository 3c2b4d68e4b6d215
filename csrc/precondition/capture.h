#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <string>
#include <vector>

namespace dear::precondition {

// How a convolution's windows lie on one dimension of an image of any size.
struct Side {
  int64_t before;  // how far the image is padded in front
  int64_t after;   // and behind
  int64_t size;    // of a window
  int64_t step;    // from an element of a window to the next
  int64_t stride;  // from a window to the next
};

// A layer, and its place in the flat vectors (Note [Flat vectors] in eva_parts.py).
struct CapturedLayer {
  at::Tensor weight;
  int64_t first_column;
  int64_t first_row;
  std::vector<Side> sides;     // of a convolution; a linear layer has none
  std::string padding;         // "constant", or what else at::pad knows
  std::vector<int64_t> order;  // of the dimensions of [groups, the weight's but the first] in memory
  int64_t groups;
};

// What the layers of this rank have seen since the last step, for one message of their means: as
// eva_means.Means has it, on the host, and without the interpreter in the backward pass. Its methods may be
// called from any thread.
class MeanCapture {
 public:
  MeanCapture(std::vector<CapturedLayer> layers, at::ScalarType dtype, int64_t columns, int64_t rows);

  // A forward pass of a layer, which counts once a backward pass that adds to the weight's gradient has come
  // through the output.
  void see(size_t layer, const at::Tensor& x, const at::Tensor& output) const;

  // Flags, mean inputs, and sums of output gradients over `scale`; zeros, if any element is not finite.
  at::Tensor message(double scale) const;

  // A step has used what was seen.
  void forget();

 private:
  struct State;
  std::shared_ptr<State> state_;  // the hooks hold it, too
};

}  // namespace dear::precondition
