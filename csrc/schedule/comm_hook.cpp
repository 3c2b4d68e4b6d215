#include "schedule/comm_hook.h"

#include <utility>

namespace dear {
namespace {

struct HookState {
  std::shared_ptr<Scheduler> scheduler;
  std::shared_ptr<HookCalls> calls;
  std::function<bool()> holds_gil;
};

class SchedulerHook : public c10d::CppCommHookInterface<HookState> {
 public:
  using CppCommHookInterface::CppCommHookInterface;

  // Runs on the autograd thread under the reducer's mutex. The bucket lives on the caller's stack, so its
  // tensors are copied out. The future is complete at once: nobody waits for communication inside backward().
  c10::intrusive_ptr<c10::ivalue::Future> runHook(c10d::GradBucket& bucket) override {
    ++state_.calls->total;
    if (state_.holds_gil()) ++state_.calls->with_gil;
    state_.scheduler->on_bucket(bucket.getIndex(),
                                {bucket.getBuffer(), bucket.getParameters(), bucket.getGradients()},
                                bucket.isLast());
    std::vector<c10::Device> devices;
    if (!bucket.getBuffer().device().is_cpu()) devices.push_back(bucket.getBuffer().device());
    auto future = c10::make_intrusive<c10::ivalue::Future>(c10::TensorType::get(), devices);
    future->markCompleted(c10::IValue(bucket.getBuffer()));
    return future;
  }
};

}  // namespace

void register_scheduler(c10d::Reducer& reducer, std::shared_ptr<Scheduler> scheduler,
                        std::shared_ptr<HookCalls> calls, std::function<bool()> holds_gil) {
  reducer.register_comm_hook(std::make_unique<SchedulerHook>(
      HookState{std::move(scheduler), std::move(calls), std::move(holds_gil)}));
  reducer.set_optimizer_in_backward();
}

}  // namespace dear
