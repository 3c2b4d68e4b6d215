#pragma once

#include "schedule/bucket.h"
#include "schedule/group_phase.h"
#include "schedule/profiled.h"

namespace dear {

// Compression as a plain DDP hook: both phases under backward, and .grad is the aggregate afterwards.
//
// Threads: on_bucket() is called on the autograd thread, bucket after bucket. Steady state never takes the
// GIL: the callbacks into Python are called for a bucket that is new, at the end of a backward pass that
// needs attention, and for compressors written in Python.
class CompressedHook {
 public:
  struct Callbacks {
    // The groups of a bucket that is new, bound to its buffer. Collective.
    std::function<TwoPhaseExchanges(size_t index, const Bucket& bucket)> bind;
    // Before a bucket goes out, in a step that is measured.
    std::function<void(size_t index)> measure;
    // At the end of a backward pass in which nothing failed, when every .grad is final: if that was asked
    // for, a bucket was new, or a gradient was non-finite. `nonfinite`: the buckets with non-finite
    // gradients.
    std::function<void(const std::vector<size_t>& nonfinite)> ended;
  };

  CompressedHook(std::shared_ptr<Pipeline> pipeline, Callbacks callbacks)
      : pipeline_(std::move(pipeline)), callbacks_(std::move(callbacks)) {}

  // Starts a bucket on its way; the future is complete when the aggregate is in it.
  c10::intrusive_ptr<c10::ivalue::Future> on_bucket(size_t index, Bucket bucket);

  // `ended` is called after every backward pass.
  void set_always_ended(bool always) { always_ended_ = always; }
  // The next backward pass is measured.
  void measure_next() { measure_next_ = true; }
  // Groups are to be made anew.
  void forget() { buckets_.clear(); }
  // DDP has laid its buckets anew, between two passes. Collective.
  void take_buckets(const std::vector<Bucket>& buckets);
  // Makes the error feedback what it was before the last step.
  void roll_back();
  // Nanoseconds that the last backward pass waited for communication behind its last bucket.
  int64_t exposed_ns() const { return exposed_ns_; }
  const std::shared_ptr<Pipeline>& pipeline() const { return pipeline_; }

 private:
  struct Known {
    at::Tensor buffer;  // held, so that no other tensor can be taken for it
    TwoPhaseExchanges exchanges;
  };

  void begin();
  void bind(size_t index, const Bucket& bucket);
  void start(size_t index, const Bucket& bucket, const c10::intrusive_ptr<c10::ivalue::Future>& future);
  // Waits until every result stands, which DDP would do without asking check_interrupt().
  void arrive();
  void end();
  // Tells a profiler when each bucket's exchanges moved.
  void report();
  void note(std::exception_ptr error);

  const std::shared_ptr<Pipeline> pipeline_;
  const Callbacks callbacks_;
  std::vector<Known> buckets_;
  size_t delivered_ = 0;         // buckets, in this backward pass
  bool open_ = false;            // buckets of it have come, and it has not ended
  const void* first_ = nullptr;  // of these, the first one's buffer
  bool always_ended_ = false;
  bool bound_ = false;  // a bucket, in this backward pass
  bool measure_next_ = false;
  bool measuring_ = false;
  int64_t last_bucket_ns_ = 0;
  int64_t exposed_ns_ = 0;
  ProfilerRows rows_;

  std::mutex mutex_;
  std::exception_ptr error_;  // the first of this backward pass
};

}  // namespace dear
