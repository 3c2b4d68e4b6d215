#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

namespace dear::precondition {

// A rectangle of a layer's gradient, as eva_parts.Rectangle in Python has it: host memory [rows, columns], or
// [groups, rows, columns], packed. `row` and `column` say where it begins in the flat vectors of all layers;
// the bias's column has the column -1, and every row the input 1.
struct Rectangle {
  at::Tensor view;
  int64_t layer;
  int64_t row;
  int64_t column;
};

// Adds G a of each rectangle to its rows of `products`, and ‖G‖² to its layer's element of `squares`, in one
// pass over the memory. `a`, `products` and `squares` are flat, of one type.
void add_products(const std::vector<Rectangle>& parts, const at::Tensor& a, const at::Tensor& products,
                  const at::Tensor& squares);

// G ← factor · G - w aᵀ, in place.
void subtract(const std::vector<Rectangle>& parts, const at::Tensor& w, const at::Tensor& a, double factor);

// Means of all layers, one after another.
struct Means {
  at::Tensor columns;
  at::Tensor rows;  // may be empty
};

// The running means of all layers, one step on: eva_means.Running.update. `first_column` and `first_row` say
// where each layer begins, and the last one ends.
void update_means(const Means& running, const at::Tensor& known, const at::Tensor& used, const Means& step,
                  const std::vector<int64_t>& first_column, const std::vector<int64_t>& first_row,
                  double decay);

// Σ x y over the elements of each block: [blocks]. `first` says where each begins, and the last one ends.
at::Tensor dot_by_block(const at::Tensor& x, const at::Tensor& y, const std::vector<int64_t>& first);

// Eva's correction of all layers: eva.EvaStep.correction and RankOneStep._scale.
struct EvaTerms {
  at::Tensor columns;                  // the running means a of the inputs, flat
  at::Tensor rows;                     // and b of the output gradients
  at::Tensor inner;                    // bᵀ G a of each block
  at::Tensor squares;                  // ‖G‖² of each layer
  std::vector<int64_t> first_column;   // of each block, and the end of the last one
  std::vector<int64_t> first_row;      // the same
  std::vector<int64_t> first_block;    // of each layer, and the end of the last one
  std::vector<bool> has_bias;          // of each layer
  std::vector<double> learning_rates;  // of each layer
  double damping;                      // γ
  std::optional<double> kl_clip;       // κ
};
struct Eva {
  at::Tensor rows;  // factor · b (bᵀ G a) / (‖a‖² ‖b‖² + γ), of all layers
  double factor;    // ν / γ
};
Eva eva_correction(const EvaTerms& terms);

// The parts one after another, flat; zeros, if any element is not finite.
at::Tensor finite_message(const std::vector<double>& flags, const std::vector<at::Tensor>& parts);

// How windows of one length lie on a dimension of an image.
struct Windows {
  int64_t before;  // zeros that are added in front
  int64_t size;    // of a window
  int64_t step;    // from an element of a window to the next
  int64_t stride;  // from a window to the next
  int64_t count;   // of windows
};

// The mean over all windows of each channel of an image [channels, sizes ...], packed: [channels, window's
// sizes ...], flat. A mean over a box is a mean of means over its sides, so each dimension is reduced for
// itself.
at::Tensor mean_of_windows(const at::Tensor& image, const std::vector<Windows>& windows);

}  // namespace dear::precondition
