#include "schedule/pipeline.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <pthread.h>

namespace dear {

Pipeline::Pipeline(std::vector<std::shared_ptr<Lane>> lanes, std::vector<std::shared_ptr<Lane>> all_to_alls,
                   at::Device device, int rank)
    : lanes_(std::move(lanes)), all_to_alls_(std::move(all_to_alls)), device_(device), rank_(rank) {
  if (!device_.is_cpu()) return;
  decoding_->thread = std::thread([this] { serve(); });
  ::pthread_setname_np(decoding_->thread.native_handle(), "dear decode");
  at_exit_.emplace([this] { end(kInterpreterEnds); }, [this] { join(); });
}

Pipeline::~Pipeline() {
  if (home_.away()) return;
  const auto leave = [this] {
    end("The compressor was dropped while an exchange was in flight.");
    join();
  };
  if (!at_exit_ || !at_exit_->cancel(leave)) leave();
}

void Pipeline::end(const std::string& reason) {
  if (!released_) abort(reason);
}

void Pipeline::join() {
  {
    std::lock_guard<std::mutex> lock(decoding_->mutex);
    decoding_->stopping = true;
  }
  decoding_->work.notify_all();
  if (decoding_->thread.joinable()) decoding_->thread.join();
}

Lane& Pipeline::lane(Phase phase, size_t stage) const {
  if (phase == Phase::kAllToAll) {
    TORCH_CHECK(stage < all_to_alls_.size() && all_to_alls_[stage],
                "A compressor makes an all-to-all of exchange ", stage, ", which it did not announce.");
    return *all_to_alls_[stage];
  }
  TORCH_CHECK(stage < lanes_.size(), "A compressor announced ", lanes_.size(), " exchanges and makes more.");
  return *lanes_[stage];
}

c10::Stream Pipeline::next_stream() {
  if (streams_.size() < kStreams) {
    const c10::impl::VirtualGuardImpl guard(device_.type());
    streams_.push_back(guard.getStreamFromGlobalPool(device_, /*isHighPriority=*/true));
  }
  return streams_[groups_++ % kStreams];
}

void Pipeline::begin_step() {
  ++steps_;
  last_step_ = counts_of_step();
  at_begin_ = counts();
}

Pipeline::Counts Pipeline::minus(const Counts& a, const Counts& b) {
  return {a.bytes_sent - b.bytes_sent, a.encode_ns - b.encode_ns, a.between_ns - b.between_ns,
          a.decode_ns - b.decode_ns};
}

void Pipeline::decode_later(std::function<void()> job) {
  {
    std::lock_guard<std::mutex> lock(decoding_->mutex);
    if (!decoding_->stopping) {
      decoding_->jobs.push_back(std::move(job));
      decoding_->work.notify_one();
      return;
    }
  }
  job();  // the thread has ended: see Note [Threads at exit]
}

void Pipeline::abort(const std::string& reason) {
  for (const auto& lane : lanes_) lane->abort(reason);
  for (const auto& lane : all_to_alls_) {
    if (lane) lane->abort(reason);
  }
}

void Pipeline::serve() {
  while (true) {
    std::function<void()> job;
    {
      std::unique_lock<std::mutex> lock(decoding_->mutex);
      decoding_->work.wait(lock, [this] { return decoding_->stopping || !decoding_->jobs.empty(); });
      // What was queued is run to its end also when stopping: its exchanges fail, and somebody may wait for
      // it.
      if (decoding_->jobs.empty()) return;
      job = std::move(decoding_->jobs.front());
      decoding_->jobs.pop_front();
    }
    job();
  }
}

}  // namespace dear
