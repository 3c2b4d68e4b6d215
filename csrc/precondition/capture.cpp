#include "precondition/capture.h"

#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <mutex>
#include <numeric>
#include <optional>
#include <utility>

#include "precondition/rank_one.h"

namespace dear::precondition {
namespace {

using torch::autograd::Node;

// Whether the backward pass that runs now adds to the gradient that this accumulates; not so, where it only
// returns it.
bool is_accumulated(Node* accumulator) {
  const auto* wanted = torch::autograd::get_current_graph_task_exec_info();
  const auto* nodes = torch::autograd::get_current_graph_task_nodes_in_graph();
  if (wanted == nullptr || nodes == nullptr || nodes->count(accumulator) == 0) {
    return false;
  }
  if (wanted->empty()) {
    return true;
  }
  const auto found = wanted->find(accumulator);
  return found != wanted->end() && found->second.should_execute() && !found->second.captures_;
}

// The tensor whose hook sees the gradient of the output as the module made it: see _in_front_of_changes in
// _capture.py.
at::Tensor in_front_of_changes(const at::Tensor& output) {
  if (output.is_view()) {
    at::Tensor base(output._base());
    if (base.is_contiguous() && output.is_contiguous() && base.numel() == output.numel()) {
      return base;
    }
  }
  return output;
}

// A sum of rows, and by what it is to be multiplied to be their mean.
struct Sum {
  at::Tensor values;  // flat
  double share = 1.0;
};

Sum sum_of_inputs(const CapturedLayer& layer, const at::Tensor& x, at::ScalarType dtype) {
  const auto dims = static_cast<int64_t>(layer.sides.size());
  if (dims == 0) {
    const at::Tensor rows = x.reshape({-1, x.size(-1)});
    return {at::sum(rows, {0}, false, dtype), 1.0 / static_cast<double>(rows.size(0))};
  }
  const bool is_batch = x.dim() == dims + 2;
  at::Tensor image = is_batch ? at::sum(x, {0}, false, dtype) : x.to(dtype);
  const bool zeros = layer.padding == "constant";
  if (!zeros) {
    std::vector<int64_t> padding;  // the last dimension's comes first
    for (auto side = layer.sides.rbegin(); side != layer.sides.rend(); ++side) {
      padding.insert(padding.end(), {side->before, side->after});
    }
    image = at::pad(image.unsqueeze(0), padding, layer.padding).squeeze(0);
  }
  image = image.contiguous();
  std::vector<Windows> windows;
  for (int64_t dim = 0; dim < dims; ++dim) {
    const Side& side = layer.sides[static_cast<size_t>(dim)];
    const int64_t before = zeros ? side.before : 0;
    const int64_t length = image.size(dim + 1) + (zeros ? side.before + side.after : 0);
    const int64_t reach = side.step * (side.size - 1) + 1;
    windows.push_back({before, side.size, side.step, side.stride, (length - reach) / side.stride + 1});
  }
  at::Tensor mean = mean_of_windows(image, windows);
  if (!layer.order.empty()) {
    std::vector<int64_t> shape{layer.groups};
    const auto sizes = layer.weight.sizes().slice(1);
    shape.insert(shape.end(), sizes.begin(), sizes.end());
    mean = mean.view(shape).permute(layer.order).reshape({-1});
  }
  return {mean, is_batch ? 1.0 / static_cast<double>(x.size(0)) : 1.0};
}

at::Tensor sum_of_outputs(const CapturedLayer& layer, const at::Tensor& grad, at::ScalarType dtype) {
  const int64_t channels = grad.dim() - 1 - static_cast<int64_t>(layer.sides.size());
  std::vector<int64_t> others;
  for (int64_t dim = 0; dim < grad.dim(); ++dim) {
    if (dim != channels) {
      others.push_back(dim);
    }
  }
  return others.empty() ? grad.to(dtype)
                        : at::sum(grad, others, false, dtype);  // an empty list would mean all
}

}  // namespace

struct MeanCapture::State {
  struct Seen {
    int64_t passes = 0;
    int task = -1;  // the last backward pass
  };

  // A pass counts.
  void add(size_t index, const Sum& input, const at::Tensor& grad) {
    const c10::NoGradGuard no_grad;
    const CapturedLayer& layer = layers[index];
    const int task = torch::autograd::get_current_graph_task_id();
    const at::Tensor output = with_rows() ? sum_of_outputs(layer, grad, dtype) : at::Tensor();
    const std::lock_guard<std::mutex> lock(mutex);
    Seen& own = seen[index];
    if (!layer.weight.grad().defined() && own.task != task) {  // given up by zero_grad() without a step
      own.passes = 0;
    }
    add_to(columns, layer.first_column, input.values, input.share, own.passes == 0);
    if (with_rows()) {
      add_to(rows, layer.first_row, output, 1.0, own.passes == 0);
    }
    own.passes += 1;
    own.task = task;
  }

  // Adds `share` times values to sums from `first` on, or puts it there.
  void add_to(const at::Tensor& sums, int64_t first, const at::Tensor& values, double share,
              bool anew) const {
    const at::Tensor packed = values.contiguous();
    AT_DISPATCH_FLOATING_TYPES(dtype, "add_to", [&] {
      auto* to = sums.mutable_data_ptr<scalar_t>() + first;
      const auto* from = packed.const_data_ptr<scalar_t>();
      const auto times = static_cast<scalar_t>(share);
      for (int64_t i = 0; i < packed.numel(); ++i) {
        to[i] = (anew ? scalar_t(0) : to[i]) + times * from[i];
      }
    });
  }

  bool with_rows() const { return rows.numel() > 0; }

  std::vector<CapturedLayer> layers;
  at::ScalarType dtype;
  mutable std::mutex mutex;  // of what follows
  std::vector<Seen> seen;
  at::Tensor columns;  // sums over the passes; meaningless where there was none
  at::Tensor rows;
};

MeanCapture::MeanCapture(std::vector<CapturedLayer> layers, at::ScalarType dtype, int64_t columns,
                         int64_t rows)
    : state_(std::make_shared<State>()) {
  state_->layers = std::move(layers);
  state_->dtype = dtype;
  state_->seen.resize(state_->layers.size());
  state_->columns = at::zeros({columns}, dtype);
  state_->rows = at::zeros({rows}, dtype);
}

void MeanCapture::see(size_t layer, const at::Tensor& x, const at::Tensor& output) const {
  const CapturedLayer& own = state_->layers.at(layer);
  if (!own.weight.requires_grad()) {  // frozen since
    return;
  }
  Sum input;
  {
    const c10::NoGradGuard no_grad;
    input = sum_of_inputs(own, x, state_->dtype);
  }
  auto accumulator = torch::autograd::impl::grad_accumulator(own.weight);
  auto shape = output.sizes().vec();
  in_front_of_changes(output).register_hook([state = state_, layer, input = std::move(input),
                                             accumulator = std::move(accumulator),
                                             shape = std::move(shape)](const at::Tensor& grad) {
    if (grad.defined() && is_accumulated(accumulator.get())) {
      state->add(layer, input, grad.sizes() == at::IntArrayRef(shape) ? grad : grad.reshape(shape));
    }
  });
}

at::Tensor MeanCapture::message(double scale) const {
  const State& state = *state_;
  const std::lock_guard<std::mutex> lock(state.mutex);
  const auto layers = static_cast<int64_t>(state.layers.size());
  at::Tensor message =
      at::empty({layers + state.columns.numel() + state.rows.numel()}, state.columns.options());
  AT_DISPATCH_FLOATING_TYPES(state.dtype, "message", [&] {
    auto* begin = message.mutable_data_ptr<scalar_t>();
    auto* end = begin + message.numel();
    const auto fill = [&](scalar_t* to, const at::Tensor& from, auto first, auto share) {
      const auto* values = from.const_data_ptr<scalar_t>();
      for (size_t layer = 0; layer < state.layers.size(); ++layer) {
        const int64_t start = first(layer);
        const int64_t stop = layer + 1 < state.layers.size() ? first(layer + 1) : from.numel();
        const auto passes = state.seen[layer].passes;
        const auto times = static_cast<scalar_t>(passes > 0 ? share(passes) : 0.0);
        std::transform(values + start, values + stop, to + start,
                       [&](scalar_t value) { return passes > 0 ? value * times : scalar_t(0); });
      }
    };
    for (size_t layer = 0; layer < state.layers.size(); ++layer) {
      begin[layer] = state.seen[layer].passes > 0 ? scalar_t(1) : scalar_t(0);
    }
    fill(
        begin + layers, state.columns, [&](size_t layer) { return state.layers[layer].first_column; },
        [](int64_t passes) { return 1.0 / static_cast<double>(passes); });
    if (state.with_rows()) {
      fill(
          begin + layers + state.columns.numel(), state.rows,
          [&](size_t layer) { return state.layers[layer].first_row; },
          [scale](int64_t) { return 1.0 / scale; });
    }
    if (!std::all_of(begin, end, [](scalar_t each) { return std::isfinite(each); })) {
      std::fill(begin, end, scalar_t(0));
    }
  });
  return message;
}

void MeanCapture::forget() {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  std::fill(state_->seen.begin(), state_->seen.end(), State::Seen{});
}

}  // namespace dear::precondition
