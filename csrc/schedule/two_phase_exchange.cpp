#include "schedule/two_phase_exchange.h"

#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <thread>

#include "collectives/clock.h"
#include "collectives/interrupt.h"
#include "schedule/profiled.h"

namespace dear {

using compress::Message;

TwoPhaseExchange::TwoPhaseExchange(std::shared_ptr<Pipeline> pipeline, std::shared_ptr<compress::Codec> codec,
                                   std::string label, std::vector<at::Tensor> keeps, bool rolls_back)
    : pipeline_(std::move(pipeline)),
      codec_(std::move(codec)),
      label_(std::move(label)),
      keeps_(std::move(keeps)),
      known_(pipeline_->stages() + 1),
      deferred_(pipeline_->stages() + 1),
      queued_(pipeline_->stages() + 1) {
  if (rolls_back) {
    for (const at::Tensor& kept : keeps_) before_.push_back(at::empty_like(kept));
  }
  const at::Device device = pipeline_->device();
  dropped_ = at::zeros({1}, at::TensorOptions().device(device).dtype(at::kInt));
  if (!device.is_cpu()) {
    stream_ = pipeline_->next_stream();
    ready_.emplace(device.type());
    encoded_.emplace(device.type());
    event_.emplace(device.type());
  }
}

TwoPhaseExchange::~TwoPhaseExchange() {
  if (home_.away()) return;
  // Nobody asks check_interrupt() here: what it throws would be lost. So no wait may last.
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(1);
  const auto in_flight = [this] {
    return !done() || std::any_of(queued_.begin(), queued_.end(),
                                  [](const auto& exchange) { return exchange && !exchange->done(); });
  };
  bool aborted = false;
  while (in_flight()) {
    const auto now = std::chrono::steady_clock::now();
    if (!aborted && now > deadline) {
      pipeline_->abort("The compressor was dropped while an exchange was in flight.");
      aborted = true;
    }
    // A collective of the device's goes on until the backend gives up, which may be in many minutes.
    if (stream_ && now > deadline + std::chrono::seconds(1)) {
      outlive();
      return;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  // Its buffers go back to the stream that they came from. At the process's end CUDA may have ended first.
  try {
    follow();
  } catch (const std::exception&) {
  }
}

// What a device may still write to is kept until the process ends.
void TwoPhaseExchange::outlive() {
  using Kept = std::tuple<std::shared_ptr<compress::Codec>, std::vector<std::shared_ptr<Exchange>>,
                          std::vector<at::Tensor>>;
  static auto* const kept = new std::vector<Kept>;  // never destroyed: the device's runtime may end before it
  kept->emplace_back(codec_, queued_, std::vector<at::Tensor>{own_, source_, target_});
}

void TwoPhaseExchange::bind(const at::Tensor& source, const at::Tensor& target, int64_t begin, int64_t numel,
                            std::vector<Run> runs) {
  runs_ = std::move(runs);
  source_ = source;
  target_ = target;
  if (runs_.empty()) {
    own_ = source.narrow(0, begin, numel);
    codec_->bind(own_, target.narrow(0, begin, numel));
    return;
  }
  own_ = at::empty({numel}, source.options());
  codec_->bind(own_, own_);
}

// Queues what `work` does on the group's stream, behind what the caller's stream has to do.
template <typename Work>
void TwoPhaseExchange::on_stream(Work work) {
  if (!stream_) {
    work();
    return;
  }
  const c10::impl::VirtualGuardImpl guard(stream_->device_type());
  ready_->record(guard.getStream(stream_->device()));
  ready_->block(*stream_);
  const c10::StreamGuard on(*stream_);
  work();
  event_->record(*stream_);
}

void TwoPhaseExchange::start() {
  wait();  // for a step that nobody has waited for
  const ProfiledSpan span("encode, ", label_);
  step_ = pipeline_->steps() - 1;
  stages_ = codec_->stages(step_);
  firsts_ = codec_->first_stages(step_);
  std::fill(queued_.begin(), queued_.end(), nullptr);
  {
    std::lock_guard<std::mutex> lock(sync_->mutex);
    error_ = nullptr;
  }
  on_stream([this] {
    if (codec_->compresses(step_)) {
      if (!before_.empty()) codec_->settle();
      for (size_t i = 0; i < before_.size(); ++i) before_[i].copy_(keeps_[i]);
    }
    for (const Run& run : runs_) {
      own_.narrow(0, run.in_group, run.numel).copy_(source_.narrow(0, run.in_bucket, run.numel));
    }
    if (std::exchange(keeps_gradient_, false)) gradient_ = own_.clone();
    const std::optional<Message> message = advance(0);
    dropped_.copy_(codec_->dropped());
    if (stream_) encoded_->record(*stream_);
    TORCH_CHECK(message, "A compressor sent nothing for ", label_, ".");
    auto exchange = exchange_for(0, *message);
    if (firsts_ == 0) {
      pending_ = std::move(exchange);
      return;
    }
    submit(0, exchange);
    for (size_t stage = 1; stage < firsts_; ++stage) submit(stage, deferred(stage));
  });
}

void TwoPhaseExchange::start_last() {
  on_stream([this] {
    for (size_t stage = firsts_; stage < stages_; ++stage) {
      submit(stage, stage == 0 ? std::move(pending_) : deferred(stage));
    }
  });
}

void TwoPhaseExchange::start_decoding(std::function<void(std::exception_ptr)> done) {
  {
    std::lock_guard<std::mutex> lock(sync_->mutex);
    in_flight_ = true;
  }
  if (!stream_) {
    pipeline_->decode_later([this, done = std::move(done)] {
      std::exception_ptr error;
      try {
        decode();
      } catch (...) {
        error = std::current_exception();
      }
      finish(error, done);
    });
    return;
  }
  std::exception_ptr error;
  try {
    on_stream([this] { decode(); });
  } catch (...) {
    error = std::current_exception();
  }
  const c10::StreamGuard on(*stream_);
  finish(error, done);
}

void TwoPhaseExchange::decode_when_awaited() {
  if (!stream_) return start_decoding({});
  submitter_.remember();
  std::lock_guard<std::mutex> lock(sync_->mutex);
  undecoded_ = true;
}

void TwoPhaseExchange::decode() {
  last()->wait();
  TORCH_CHECK(!advance(stages_), "A compressor announced ", stages_, " exchanges and makes more.");
  for (const Run& run : runs_) {
    target_.narrow(0, run.in_bucket, run.numel).copy_(own_.narrow(0, run.in_group, run.numel));
  }
}

void TwoPhaseExchange::finish(std::exception_ptr error, const std::function<void(std::exception_ptr)>& done) {
  if (done) done(error);
  std::lock_guard<std::mutex> lock(sync_->mutex);
  error_ = error;
  in_flight_ = false;
  sync_->ended.notify_all();
}

std::optional<Message> TwoPhaseExchange::advance(size_t stage) {
  const int64_t start = now_ns();
  auto message = codec_->advance(step_, stage);
  auto& total = stage == 0         ? pipeline_->encode_ns
                : stage == stages_ ? pipeline_->decode_ns
                                   : pipeline_->between_ns;
  const int64_t end = now_ns();
  total += end - start;
  if (stage == stages_ && !stream_) {
    decode_start_ns_ = start;
    decode_end_ns_ = end;
  }
  return message;
}

std::shared_ptr<Exchange> TwoPhaseExchange::exchange_for(size_t stage, const Message& message) {
  const void* full = message.full.const_data_ptr();
  const void* shard = message.shard.defined() ? message.shard.const_data_ptr() : nullptr;
  const int64_t numel = message.full.numel();
  Lane& lane = pipeline_->lane(message.phase, stage);
  auto& known = known_.at(stage);
  for (const Known& one : known) {
    if (one.full == full && one.shard == shard && one.numel == numel) {
      pipeline_->bytes_sent += one.exchange->bytes_sent();
      return one.exchange;
    }
  }
  if (known.size() > 4) known.clear();  // a compressor that makes new tensors each step
  const Part part{message.full, message.shard.defined() ? message.shard : message.full.narrow(0, 0, 0),
                  message.owners};
  const auto exchange = lane.make_exchange(message.phase, Reduction::kAverage, {part}, label_);
  known.push_back({full, shard, numel, exchange});
  pipeline_->bytes_sent += exchange->bytes_sent();
  return exchange;
}

std::shared_ptr<Exchange> TwoPhaseExchange::deferred(size_t stage) {
  auto& exchange = deferred_.at(stage);
  // Of the ring's lane it may become a reduce-scatter or an all-gather, when the lane reaches it.
  const Phase phase = codec_->all_to_all(step_, stage) ? Phase::kAllToAll : Phase::kAllGather;
  if (!exchange || exchange->phase() != phase) {
    exchange = pipeline_->lane(phase, stage).make_exchange(phase, Reduction::kAverage, {}, label_);
    exchange->defer([this, stage, phase]() -> std::shared_ptr<Exchange> {
      queued_[stage - 1]->wait();
      const std::optional<Message> message = advance(stage);
      TORCH_CHECK(message, "A compressor announced ", stages_, " exchanges and made ", stage, ".");
      TORCH_CHECK((message->phase == Phase::kAllToAll) == (phase == Phase::kAllToAll),
                  "A compressor makes an all-to-all of exchange ", stage, ", which it did not announce.");
      return exchange_for(stage, *message);
    });
  }
  return exchange;
}

void TwoPhaseExchange::submit(size_t stage, const std::shared_ptr<Exchange>& exchange) {
  queued_[stage] = exchange;
  pipeline_->lane(exchange->phase(), stage).submit(exchange);
}

void TwoPhaseExchange::wait_first() {
  if (const auto exchange = end_of_first()) exchange->wait();
}

bool TwoPhaseExchange::first_done() {
  const auto exchange = end_of_first();
  return !exchange || exchange->done();
}

void TwoPhaseExchange::wait() {
  home_.check("A compressor");
  bool decodes = false;
  {
    std::lock_guard<std::mutex> lock(sync_->mutex);
    decodes = std::exchange(undecoded_, false);
    if (decodes) in_flight_ = true;  // at once, or another thread would find it ended
  }
  if (decodes) submitter_.run([this] { start_decoding({}); });
  wait_ended();
  {
    std::lock_guard<std::mutex> lock(sync_->mutex);
    if (error_) std::rethrow_exception(error_);
  }
  follow();
}

void TwoPhaseExchange::wait_ended() {
  home_.check("A compressor");
  std::unique_lock<std::mutex> lock(sync_->mutex);
  wait_interruptibly(sync_->ended, lock, [this] { return !in_flight_; });
}

void TwoPhaseExchange::follow() { order_behind(event_); }

at::Tensor TwoPhaseExchange::dropped() {
  order_behind(encoded_);
  return dropped_;
}

void TwoPhaseExchange::order_behind(const std::optional<c10::Event>& event) {
  if (!stream_) return;
  const c10::impl::VirtualGuardImpl guard(stream_->device_type());
  event->block(guard.getStream(stream_->device()));
}

bool TwoPhaseExchange::done() {
  std::lock_guard<std::mutex> lock(sync_->mutex);
  return !in_flight_;
}

bool TwoPhaseExchange::has_nonfinite() const {
  const at::Tensor nonfinite = codec_->nonfinite();
  return nonfinite.defined() && nonfinite.ne(0).any().item<bool>();
}

bool TwoPhaseExchange::any_nonfinite(const std::vector<std::shared_ptr<TwoPhaseExchange>>& exchanges) {
  std::vector<at::Tensor> found;
  for (const auto& exchange : exchanges) {
    if (!exchange->stream_ && exchange->has_nonfinite())
      return true;  // the host's: nothing is to be waited for
    const at::Tensor nonfinite = exchange->codec_->nonfinite();
    if (exchange->stream_ && nonfinite.defined()) found.push_back(nonfinite.ne(0).any().view({1}));
  }
  return !found.empty() && at::cat(found).any().item<bool>();
}

void TwoPhaseExchange::roll_back() {
  if (!codec_->compresses(step_)) return;
  for (size_t i = 0; i < before_.size(); ++i) keeps_[i].copy_(before_[i]);
  codec_->forget();
}

}  // namespace dear
