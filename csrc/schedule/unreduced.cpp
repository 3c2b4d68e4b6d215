#include "schedule/unreduced.h"

#include <torch/csrc/autograd/utils/lambda_post_hook.h>

#include <optional>

#include "schedule/comm_hook.h"

namespace dear {

// Each element is written by the one thread that accumulates its parameter, and read behind the backward
// pass.
struct Unreduced::Noted {
  // Weak: it keeps no values, and nobody else's tensor gets this one's address.
  using Grad = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

  struct One {
    at::Tensor param;
    std::optional<Grad> grad;
    int64_t pass = 0;  // how many had been reduced then
  };

  void accumulated(size_t index) {
    const auto alive = reducer.lock();
    if (alive && expects_gradients(*alive)) return;
    One& one = of[index];
    one.grad = Grad(one.param.grad().getIntrusivePtr());
    one.pass = scheduler->passes();
  }

  std::vector<One> of;
  std::weak_ptr<c10d::Reducer> reducer;
  std::shared_ptr<Scheduler> scheduler;
};

Unreduced::Unreduced(const std::vector<at::Tensor>& params, const std::shared_ptr<c10d::Reducer>& reducer,
                     std::shared_ptr<Scheduler> scheduler)
    : noted_(std::make_shared<Noted>()) {
  noted_->reducer = reducer;
  noted_->scheduler = std::move(scheduler);
  for (const at::Tensor& param : params) noted_->of.push_back({param, std::nullopt});
  for (size_t index = 0; index < params.size(); ++index) {
    using torch::autograd::variable_list;
    auto accumulator = torch::autograd::impl::grad_accumulator(params[index]);
    auto note = [noted = noted_.get(), index](const variable_list& outputs, const variable_list&) {
      noted->accumulated(index);
      return outputs;
    };
    // Compiled autograd never comes here: DDP's own hook refuses it.
    auto hook = std::make_unique<torch::autograd::utils::LambdaPostHook>(
        std::move(note), [](torch::dynamo::autograd::CompiledNodeArgs&) {});
    const uintptr_t key = accumulator->add_post_hook(std::move(hook));
    hooks_.emplace_back(std::move(accumulator), key);
  }
}

Unreduced::~Unreduced() {
  for (auto& [accumulator, key] : hooks_) accumulator->del_post_hook(key);
}

bool Unreduced::has(size_t index) const {
  const Noted::One& one = noted_->of.at(index);
  const at::Tensor& grad = one.param.grad();
  return one.grad && one.grad->_unsafe_get_target() == grad.unsafeGetTensorImpl() && grad.defined() &&
         one.pass == noted_->scheduler->passes();
}

}  // namespace dear
