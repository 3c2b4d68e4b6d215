#include "schedule/comm_hook.h"

#include <utility>

namespace dear {
namespace {

using Future = c10::intrusive_ptr<c10::ivalue::Future>;

struct HookState {
  std::function<Future(c10d::GradBucket&)> on_bucket;
  std::shared_ptr<HookCalls> calls;
  HoldsGil holds_gil;
};

class Hook : public c10d::CppCommHookInterface<HookState> {
 public:
  using CppCommHookInterface::CppCommHookInterface;

  // Runs on the autograd thread under the reducer's mutex. The bucket lives on the caller's stack, so its
  // tensors are copied out.
  Future runHook(c10d::GradBucket& bucket) override {
    ++state_.calls->total;
    if (state_.holds_gil()) ++state_.calls->with_gil;
    return state_.on_bucket(bucket);
  }
};

Bucket copy_out(c10d::GradBucket& bucket) {
  return {bucket.getBuffer(), bucket.getParameters(), bucket.getGradients()};
}

}  // namespace

void register_scheduler(c10d::Reducer& reducer, std::shared_ptr<Scheduler> scheduler,
                        std::shared_ptr<HookCalls> calls, HoldsGil holds_gil) {
  const auto on_bucket = [scheduler = std::move(scheduler)](c10d::GradBucket& bucket) {
    scheduler->on_bucket(bucket.getIndex(), copy_out(bucket), bucket.isLast());
    // Complete at once: nobody waits for communication inside backward().
    Future future = make_future(bucket.getBuffer());
    future->markCompleted(c10::IValue(bucket.getBuffer()));
    return future;
  };
  reducer.register_comm_hook(
      std::make_unique<Hook>(HookState{on_bucket, std::move(calls), std::move(holds_gil)}));
  reducer.set_optimizer_in_backward();
}

void rebuild_buckets(c10d::Reducer& reducer, Scheduler& scheduler) {
  if (reducer.rebuild_buckets()) take_buckets(reducer, scheduler);
}

void take_buckets(c10d::Reducer& reducer, Scheduler& scheduler) {
  std::vector<Bucket> buckets;
  for (c10d::GradBucket& bucket : reducer.get_grad_buckets(/*return_zero_tensors=*/false)) {
    buckets.push_back(copy_out(bucket));
  }
  scheduler.replace_incoming(std::move(buckets));
}

void register_compressed_hook(c10d::Reducer& reducer, std::shared_ptr<CompressedHook> hook,
                              std::shared_ptr<HookCalls> calls, HoldsGil holds_gil) {
  const auto on_bucket = [hook = std::move(hook)](c10d::GradBucket& bucket) {
    return hook->on_bucket(bucket.getIndex(), copy_out(bucket));
  };
  reducer.register_comm_hook(
      std::make_unique<Hook>(HookState{on_bucket, std::move(calls), std::move(holds_gil)}));
}

}  // namespace dear
