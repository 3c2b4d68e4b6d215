#include "schedule/comm_hook.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#ifdef DEAR_WITH_CUDA
#include <c10/cuda/CUDAGraphsC10Utils.h>
#endif

#include <type_traits>
#include <utility>

namespace dear {
namespace {

using Future = c10::intrusive_ptr<c10::ivalue::Future>;

struct HookState {
  std::function<Future(c10d::GradBucket&)> on_bucket;
  std::shared_ptr<HookCalls> calls;
  HoldsGil holds_gil;
};

// Whether a graph is being captured on the current stream of the device. Not every torch can say it of any
// device; of CUDA all can, to whoever is built with it.
template <typename Guard, typename = void>
struct Captures {
  static bool on(const Guard&, at::Device) { return false; }
};
template <typename Guard>
struct Captures<Guard, std::void_t<decltype(&Guard::isStreamCapturing)>> {
  static bool on(const Guard& guard, at::Device device) {
    return guard.isStreamCapturing(guard.getStream(device));
  }
};

bool is_capturing(at::Device device) {
#ifdef DEAR_WITH_CUDA
  if (device.is_cuda())
    return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
#endif
  using Guard = c10::impl::VirtualGuardImpl;
  return Captures<Guard>::on(Guard(device.type()), device);
}

// What a graph replays has no host in it: no queue, no lane's order, no look at what has changed.
void refuse_capture(const at::Tensor& buffer) {
  if (buffer.is_cpu()) return;
  TORCH_CHECK(!is_capturing(buffer.device()),
              "A CUDA graph is being captured around a backward pass whose gradients this library exchanges, "
              "which no graph can hold: leave the step uncaptured, or capture parts of the model alone, with "
              "torch.cuda.make_graphed_callables.");
}

class Hook : public c10d::CppCommHookInterface<HookState> {
 public:
  using CppCommHookInterface::CppCommHookInterface;

  // Runs on the autograd thread under the reducer's mutex. The bucket lives on the caller's stack, so its
  // tensors are copied out.
  Future runHook(c10d::GradBucket& bucket) override {
    ++state_.calls->total;
    if (state_.holds_gil()) ++state_.calls->with_gil;
    refuse_capture(bucket.getBufferRef());
    return state_.on_bucket(bucket);
  }
};

Bucket copy_out(c10d::GradBucket& bucket) {
  return {bucket.getBuffer(), bucket.getParameters(), bucket.getGradients()};
}

std::vector<Bucket> buckets_of(c10d::Reducer& reducer) {
  std::vector<Bucket> buckets;
  for (c10d::GradBucket& bucket : reducer.get_grad_buckets(/*return_zero_tensors=*/false)) {
    buckets.push_back(copy_out(bucket));
  }
  return buckets;
}

// Note [The first pass of a static graph]
// DDP learns a static graph from a reducer's first pass, at whose end it hands out all buckets, and says of
// each that it is the first one. There are several where parameters are of several dtypes.
class Places {
 public:
  // `first`: buckets that the first pass hands out so; 0 where it does not.
  explicit Places(size_t first) : first_(first) {}

  // A bucket's number, and whether it is the last of the pass.
  std::pair<size_t, bool> of(const c10d::GradBucket& bucket) {
    if (handed_out_ == first_) return {bucket.getIndex(), bucket.isLast()};
    const size_t index = handed_out_++;
    return {index, handed_out_ == first_};
  }

 private:
  size_t first_;
  size_t handed_out_ = 0;
};

}  // namespace

void register_scheduler(c10d::Reducer& reducer, std::shared_ptr<Scheduler> scheduler,
                        std::shared_ptr<HookCalls> calls, HoldsGil holds_gil, bool learns_graph) {
  const auto places = std::make_shared<Places>(learns_graph ? buckets_of(reducer).size() : 0);
  const auto on_bucket = [scheduler = std::move(scheduler), places](c10d::GradBucket& bucket) {
    const auto [index, last] = places->of(bucket);
    scheduler->on_bucket(index, copy_out(bucket), last);
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

void rebuild_buckets(c10d::Reducer& reducer, CompressedHook& hook) {
  if (reducer.rebuild_buckets()) hook.take_buckets(buckets_of(reducer));
}

void take_buckets(c10d::Reducer& reducer, Scheduler& scheduler) {
  scheduler.replace_incoming(buckets_of(reducer));
}

bool expects_gradients(const c10d::Reducer& reducer) {
  struct Opened : c10d::Reducer {  // what is protected, a class of its own may name
    static bool expects(const c10d::Reducer& reducer) { return reducer.*(&Opened::expect_autograd_hooks_); }
  };
  return Opened::expects(reducer);
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
