#pragma once

#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include "collectives/submitter.h"
#include "compress/codec.h"
#include "schedule/pipeline.h"

namespace dear {

// A run of elements that lies elsewhere in the group than in the bucket.
struct Run {
  int64_t in_bucket;
  int64_t in_group;
  int64_t numel;
};

// One group's way through a step: encoded, exchanged, decoded. Made once for a group in a bucket.
//
// The first phase is as many exchanges as the codec says, commonly all but the last one; the second phase the
// others and the decoding.
//
// Threads: start(), start_last(), start_decoding() and the waits as Pipeline says; `done` is called on the
// decoding thread.
class TwoPhaseExchange {
 public:
  // `keeps`: what a step with non-finite gradients must leave as it was; copied at each step where
  // `rolls_back`.
  TwoPhaseExchange(std::shared_ptr<Pipeline> pipeline, std::shared_ptr<compress::Codec> codec,
                   std::string label, std::vector<at::Tensor> keeps, bool rolls_back);
  // Waits for what is in flight, and makes it fail where that lasts.
  ~TwoPhaseExchange();
  TwoPhaseExchange(const TwoPhaseExchange&) = delete;
  TwoPhaseExchange& operator=(const TwoPhaseExchange&) = delete;

  // Where the gradient comes from and where the result goes: flat buffers of a bucket, maybe the same. The
  // group is `numel` elements from `begin` on, or where `runs` says, if there are any.
  void bind(const at::Tensor& source, const at::Tensor& target, int64_t begin, int64_t numel,
            std::vector<Run> runs);

  // The next start() copies the gradient, since the result may take its place.
  void keep_gradient() { keeps_gradient_ = true; }
  // The copy, flat as the group is, once; undefined where none was made.
  at::Tensor take_gradient() { return std::exchange(gradient_, {}); }

  // Encodes and queues the first phase.
  void start();
  // Queue the second phase: its exchanges, and then the decoding. `done` hears of its end, and of what went
  // wrong; it may be empty. Of groups whose second phases are queued together all exchanges come first, since
  // what a stream is to decode holds up what is queued there behind it.
  void start_last();
  void start_decoding(std::function<void(std::exception_ptr)> done);
  // The same for who waits for each group by itself. On a GPU nothing is queued before wait(): see Note [Few
  // streams].
  void decode_when_awaited();

  // Block until that phase has ended (on a GPU: until the current stream is ordered behind it); rethrow.
  void wait_first();
  void wait();
  // Blocks until the second phase has ended, well or not.
  void wait_ended();
  bool first_done();
  bool done();

  // --- after the step ---

  bool compressed() const { return codec_->compresses(step_); }
  // Orders the caller's current stream, on a GPU, behind what is queued of the group so far. Nothing on the
  // host.
  void follow();
  // This rank has dropped elements that were not finite. Known after start(); int32 [1], for the current
  // stream.
  at::Tensor dropped();
  // Any rank has; known after wait(). Reads the device.
  bool has_nonfinite() const;
  // The same for several, of one device, which is read once: a host that waits for the device for each group
  // waits often.
  static bool any_nonfinite(const std::vector<std::shared_ptr<TwoPhaseExchange>>& exchanges);
  // Makes the error feedback what it was before the step.
  void roll_back();
  const std::string& label() const { return label_; }
  // When the last step's exchanges of either phase moved; nanoseconds, 0 when not known.
  int64_t first_start_ns() const { return queued(0) ? queued(0)->start_ns() : 0; }
  int64_t first_end_ns() const { return end_of_first() ? end_of_first()->end_ns() : 0; }
  int64_t last_start_ns() const { return queued(firsts_) ? queued(firsts_)->start_ns() : 0; }
  int64_t last_end_ns() const { return last() ? last()->end_ns() : 0; }
  // Of the last step's decoding, on the host, once it was waited for.
  int64_t decode_start_ns() const { return decode_start_ns_; }
  int64_t decode_end_ns() const { return decode_end_ns_; }

 private:
  struct Known {
    const void* full;
    const void* shard;
    int64_t numel;
    std::shared_ptr<Exchange> exchange;
  };

  const std::shared_ptr<Exchange>& queued(size_t stage) const { return queued_[stage]; }
  const std::shared_ptr<Exchange>& last() const { return queued_[stages_ > 0 ? stages_ - 1 : 0]; }
  // Null where the first phase has none, or none is queued.
  std::shared_ptr<Exchange> end_of_first() const { return firsts_ > 0 ? queued(firsts_ - 1) : nullptr; }
  // Asks the codec for its message, and counts the time.
  std::optional<compress::Message> advance(size_t stage);
  std::shared_ptr<Exchange> exchange_for(size_t stage, const compress::Message& message);
  std::shared_ptr<Exchange> deferred(size_t stage);
  void submit(size_t stage, const std::shared_ptr<Exchange>& exchange);
  void finish(std::exception_ptr error, const std::function<void(std::exception_ptr)>& done);
  void decode();
  void outlive();
  template <typename Work>
  void on_stream(Work work);
  // Orders the caller's current stream behind the event.
  void order_behind(const std::optional<c10::Event>& event);

  const std::shared_ptr<Pipeline> pipeline_;
  const std::shared_ptr<compress::Codec> codec_;
  const std::string label_;
  std::vector<at::Tensor> keeps_;
  std::vector<at::Tensor> before_;
  at::Tensor dropped_;

  at::Tensor source_;  // of the bucket; used where there are runs
  at::Tensor target_;
  at::Tensor own_;  // the group in one run: a part of the source, or a copy where it is not so in the bucket
  at::Tensor gradient_;  // copied for whoever asked for it
  bool keeps_gradient_ = false;
  std::vector<Run> runs_;

  int64_t step_ = 0;
  size_t stages_ = 0;
  size_t firsts_ = 0;  // of them, in the first phase
  int64_t decode_start_ns_ = 0;
  int64_t decode_end_ns_ = 0;
  std::vector<std::vector<Known>> known_;            // by stage
  std::vector<std::shared_ptr<Exchange>> deferred_;  // by stage; null at 0
  std::vector<std::shared_ptr<Exchange>> queued_;    // of this step, by stage; null where none is yet
  std::shared_ptr<Exchange> pending_;                // the first exchange, where start_last() queues it

  // On a GPU, with what orders it behind the caller, and the caller behind it.
  std::optional<c10::Stream> stream_;
  std::optional<c10::Event> ready_;
  std::optional<c10::Event> encoded_;
  std::optional<c10::Event> event_;

  struct Sync {
    std::mutex mutex;
    std::condition_variable ended;
  };
  HomeProcess home_;
  HomeOnly<Sync> sync_;  // see Note [Forked children]
  bool in_flight_ = false;
  bool undecoded_ = false;  // the exchange is queued, and wait() decodes what it brings
  Submitter submitter_;     // of what wait() decodes
  std::exception_ptr error_;
};

}  // namespace dear
