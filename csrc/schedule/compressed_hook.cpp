#include "schedule/compressed_hook.h"

#include <torch/csrc/autograd/engine.h>

#include "collectives/clock.h"

namespace dear {

using Future = c10::intrusive_ptr<c10::ivalue::Future>;

Future CompressedHook::on_bucket(size_t index, Bucket bucket) {
  Future future = make_future(bucket.buffer);
  if (index == 0 && open_ && bucket.buffer.unsafeGetTensorImpl() != first_) {
    index = delivered_;  // Note [The first pass of a static graph]
  } else if (index == 0) {
    first_ = bucket.buffer.unsafeGetTensorImpl();
    begin();
  }
  ++delivered_;
  bool failed;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    failed = error_ != nullptr;
  }
  // An error is thrown by end(), when DDP has finished with its buckets: it cannot be left half way.
  if (!failed) {
    try {
      start(index, bucket, future);
      last_bucket_ns_ = now_ns();
      return future;
    } catch (...) {
      note(std::current_exception());
    }
  }
  if (!future->completed()) future->markCompleted(c10::IValue(bucket.buffer));
  return future;
}

void CompressedHook::begin() {
  pipeline_->begin_step();
  delivered_ = 0;
  open_ = true;
  bound_ = false;
  measuring_ = std::exchange(measure_next_, false);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    error_ = nullptr;
  }
  // The first callback comes before the one in which DDP finishes its own work, the second after it.
  auto& engine = torch::autograd::Engine::get_default_engine();
  engine.queue_callback([this, &engine] {
    arrive();
    engine.queue_callback([this] { end(); });  // last: it may move this function
  });
}

void CompressedHook::bind(size_t index, const Bucket& bucket) {
  TwoPhaseExchanges exchanges = callbacks_.bind(index, bucket);
  TORCH_CHECK(!exchanges.empty(), "A bucket was bound to no group.");
  buckets_.push_back({bucket.buffer, std::move(exchanges)});
}

void CompressedHook::take_buckets(const std::vector<Bucket>& buckets) {
  buckets_.clear();
  for (size_t index = 0; index < buckets.size(); ++index) bind(index, buckets[index]);
}

void CompressedHook::start(size_t index, const Bucket& bucket, const Future& future) {
  const ProfiledSpan span("submit, bucket ", index);
  const bool known = index < buckets_.size() &&
                     buckets_[index].buffer.unsafeGetTensorImpl() == bucket.buffer.unsafeGetTensorImpl();
  if (!known) {
    // DDP rebuilds all of its buckets or none, so those behind this one are old too.
    buckets_.resize(index);
    bind(index, bucket);
    bound_ = true;
  }
  if (measuring_) callbacks_.measure(index);
  const TwoPhaseExchanges& exchanges = buckets_[index].exchanges;
  const auto left = std::make_shared<std::atomic<size_t>>(exchanges.size());
  // On a GPU the future stands for the stream it is completed on, the last group's: others go before.
  TwoPhaseExchanges queued = bucket.buffer.is_cpu() ? TwoPhaseExchanges{} : exchanges;
  const auto done = [this, left, future, buffer = bucket.buffer,
                     queued = std::move(queued)](std::exception_ptr error) {
    if (error) note(std::move(error));
    if (--*left > 0) return;
    for (const auto& exchange : queued) exchange->follow();
    future->markCompleted(c10::IValue(buffer));
  };
  try {
    for (const auto& exchange : exchanges) exchange->start();
  } catch (...) {
    // The peers wait for what this rank will not send.
    const auto error = std::current_exception();
    pipeline_->abort("Rank " + std::to_string(pipeline_->rank()) + " failed to compress a gradient.");
    std::rethrow_exception(error);
  }
  for (const auto& exchange : exchanges) exchange->start_last();
  for (const auto& exchange : exchanges) exchange->start_decoding(done);
}

void CompressedHook::note(std::exception_ptr error) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!error_) error_ = std::move(error);
}

void CompressedHook::arrive() {
  for (size_t i = 0; i < std::min(delivered_, buckets_.size()); ++i) {
    const ProfiledSpan span("wait, bucket ", i);
    // DDP is about to wait for all ranks by itself where parameters may go unused, and would not name who is
    // missing.
    for (const auto& exchange : buckets_[i].exchanges)
      always_ended_ ? exchange->wait() : exchange->wait_ended();
  }
}

void CompressedHook::end() {
  open_ = false;
  exposed_ns_ = now_ns() - last_bucket_ns_;
  std::exception_ptr error;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    error = std::exchange(error_, nullptr);
  }
  if (error) std::rethrow_exception(error);
  TwoPhaseExchanges all;
  for (size_t i = 0; i < delivered_; ++i) {
    // The futures completed a moment before the exchanges were done.
    for (const auto& exchange : buckets_[i].exchanges) exchange->wait();
    all.insert(all.end(), buckets_[i].exchanges.begin(), buckets_[i].exchanges.end());
  }
  if (profiled()) report();
  std::vector<size_t> nonfinite;
  if (TwoPhaseExchange::any_nonfinite(all)) {
    for (size_t i = 0; i < delivered_; ++i) {
      if (TwoPhaseExchange::any_nonfinite(buckets_[i].exchanges)) nonfinite.push_back(i);
    }
  }
  if (always_ended_ || measuring_ || bound_ || !nonfinite.empty()) callbacks_.ended(nonfinite);
}

void CompressedHook::report() {
  for (size_t i = 0; i < delivered_; ++i) {
    if (!buckets_[i].buffer.is_cpu()) continue;  // the profiler shows what the device did
    for (const auto& exchange : buckets_[i].exchanges) {
      const std::string& name = exchange->label();
      rows_.report(phase_name(Phase::kReduceScatter), name, exchange->first_start_ns(),
                   exchange->first_end_ns());
      rows_.report(phase_name(Phase::kAllGather), name, exchange->last_start_ns(), exchange->last_end_ns());
      rows_.report("decode", name, exchange->decode_start_ns(), exchange->decode_end_ns());
    }
  }
}

void CompressedHook::roll_back() {
  for (size_t i = 0; i < std::min(delivered_, buckets_.size()); ++i) {
    for (const auto& exchange : buckets_[i].exchanges) exchange->roll_back();
  }
}

}  // namespace dear
