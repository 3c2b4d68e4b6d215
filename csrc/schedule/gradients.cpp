#include "schedule/gradients.h"

namespace dear {
namespace {

bool share_memory(const at::Tensor& a, const at::Tensor& b) {
  return a.has_storage() && b.has_storage() && a.const_data_ptr() == b.const_data_ptr();
}

}  // namespace

GradientWalk::Found GradientWalk::look() const {
  Found found;
  for (size_t i = 0; i < expected_.size(); ++i) {
    const auto& [param, placeholder] = expected_[i];
    const at::Tensor& grad = param.grad();
    if (!grad.defined()) {
      found.missing.push_back(i);
    } else if (grad.is_same(placeholder)) {
      found.reduced = true;
    } else if (share_memory(grad, placeholder)) {
      found.reduced = found.plain = true;
    } else {
      found.own.push_back(i);
    }
  }
  for (size_t i = 0; i < idle_.size(); ++i) {
    if (idle_[i].grad().defined()) found.own.push_back(expected_.size() + i);
  }
  return found;
}

}  // namespace dear
