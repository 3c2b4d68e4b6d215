#include "collectives/host_lane.h"

#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "collectives/clock.h"

namespace dear {
namespace {

void describe(const Exchange& exchange, uint32_t sequence, ExchangeRecord& record) {
  record.sequence = sequence;
  record.phase = phase_name(exchange.phase());
  record.label = exchange.label();
  record.bytes = exchange.bytes();
  record.start_ns = record.end_ns = 0;
}

constexpr const char* kShutDown = "The communication lane was shut down while an exchange was in flight.";

// What torch throws has a stack behind it.
std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

}  // namespace

HostLane::HostLane(std::shared_ptr<Peers> peers, std::string name, std::chrono::milliseconds timeout,
                   std::vector<int> ranks)
    : peers_(std::move(peers)),
      members_(peers_->rank(), peers_->world(), std::move(ranks)),
      rank_(members_.place()),
      world_(members_.size()),
      timeout_(timeout),
      name_(std::move(name)),
      wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      progress_(static_cast<size_t>(peers_->world())) {
  shared_->remarked = members_.rank();
}

HostLane::~HostLane() { ::close(wake_); }

void HostLane::start() {
  shared_->thread = std::thread([this] { run(); });
  // The kernel keeps 15 characters.
  ::pthread_setname_np(shared_->thread.native_handle(), ("dear " + name_).substr(0, 15).c_str());
  peers_->join(this);
  at_exit_.emplace([this] { abort(kInterpreterEnds); }, [this] { join(); });
}

void HostLane::stop() {
  if (home_.away()) return;
  const auto leave = [this] {
    abort(kShutDown);
    join();
  };
  if (!at_exit_->cancel(leave)) leave();
}

void HostLane::join() {
  if (!shared_->thread.joinable()) return;
  peers_->leave(this);
  {
    std::lock_guard<std::mutex> lock(shared_->mutex);
    shared_->stopping = true;
  }
  shared_->work.notify_all();
  shared_->thread.join();
  if (cut_short_) await_delivery(connections());
}

void HostLane::submit(const std::shared_ptr<Exchange>& exchange) {
  home_.check("A collective");
  exchange->begin();
  {
    std::lock_guard<std::mutex> lock(shared_->mutex);
    if (!shared_->error) {
      shared_->queue.push_back(exchange);
      shared_->work.notify_one();
      return;
    }
  }
  exchange->fail(shared_->error);
}

void HostLane::abort(const std::string& reason) {
  if (home_.away()) return;
  std::string given = reason;
  {
    std::lock_guard<std::mutex> lock(shared_->mutex);
    const bool busy = shared_->state != State::kIdle || !shared_->queue.empty();
    if (!busy && reason.rfind("Rank " + std::to_string(members_.rank()) + " ", 0) != 0) given.clear();
  }
  end(Failure(given, {members_.rank()}, true),
      std::make_exception_ptr(Failure(reason, {members_.rank()}, true)));
}

void HostLane::hear(const Failure& news) { end(news, std::make_exception_ptr(news)); }

void HostLane::hear_waiting(int culprit) {
  // Where frames are under way, they say it themselves.
  const std::unique_lock<std::mutex> wire(shared_->wire, std::try_to_lock);
  if (!wire.owns_lock() || told_ || shared_->remarked == culprit) return;
  shared_->remarked = culprit;
  remark(culprit);
}

void HostLane::end(const Failure& ending, std::exception_ptr error) {
  {
    std::lock_guard<std::mutex> lock(shared_->mutex);
    if (shared_->ending) return;
    shared_->ending = ending;
    if (!shared_->error) shared_->error = std::move(error);
  }
  const uint64_t one = 1;
  [[maybe_unused]] const auto written = ::write(wake_, &one, sizeof(one));
  shared_->work.notify_all();
  tell_once(ending);
}

bool HostLane::tell_once(const Failure& failure) {
  if (told_) return true;
  // Where a frame is under way, the thread that moves it tells behind its end.
  const std::unique_lock<std::mutex> wire(shared_->wire, std::try_to_lock);
  if (!wire.owns_lock()) return false;
  if (!told_) tell(failure.leaving ? FrameType::kLeft : FrameType::kFailure, failure);
  told_ = true;
  return true;
}

std::optional<Failure> HostLane::look() {
  const std::unique_lock<std::mutex> wire(shared_->wire, std::try_to_lock);
  return wire.owns_lock() ? find_news() : std::nullopt;
}

Failure HostLane::explain_loss(int peer, const std::string& what, const Exchange& exchange) {
  const auto patience = std::min<std::chrono::milliseconds>(timeout_ / 4, std::chrono::seconds(1));
  return peers_->explain_loss(peer, what, phase_name(exchange.phase()), exchange.label(), patience, this);
}

std::vector<int> HostLane::gone() {
  const std::unique_lock<std::mutex> wire(shared_->wire, std::try_to_lock);
  return wire.owns_lock() && !told_ ? find_gone() : std::vector<int>{};
}

std::optional<Failure> HostLane::ending() {
  std::lock_guard<std::mutex> lock(shared_->mutex);
  return shared_->ending;
}

Failure HostLane::publish(const Failure& failure) {
  return failure.leaving ? failure : peers_->publish(failure, this);
}

// Blocks until there is something to do; null: nothing more will be.
std::shared_ptr<Exchange> HostLane::next() {
  std::unique_lock<std::mutex> lock(shared_->mutex);
  shared_->work.wait(lock,
                     [this] { return shared_->stopping || !shared_->queue.empty() || shared_->ending; });
  if (shared_->ending || shared_->stopping) return nullptr;
  const auto exchange = std::move(shared_->queue.front());
  shared_->queue.pop_front();
  shared_->state = State::kPreparing;
  describe(*exchange, sequence_, shared_->current);
  return exchange;
}

void HostLane::move(Exchange& exchange) {
  Exchange& moved = exchange.built();
  const std::lock_guard<std::mutex> wire(shared_->wire);
  if (const auto why = ending()) throw *why;
  exchange.started();
  shared_->remarked = members_.rank();  // what comes now says more
  {
    std::lock_guard<std::mutex> lock(shared_->mutex);
    shared_->state = State::kMoving;
    shared_->current.phase = phase_name(moved.phase());
    shared_->current.bytes = moved.bytes();
    shared_->current.start_ns = exchange.start_ns();
  }
  try {
    transfer(moved, {members_, peers_->world(), timeout_, sequence_, wake_, peers_->check(), *this});
  } catch (const Failure&) {
    told_ = true;
    cut_short_ = true;
    throw;
  }
}

void HostLane::run() {
  while (true) {
    const std::shared_ptr<Exchange> exchange = next();
    if (!exchange) {
      const std::optional<Failure> why = ending();
      if (why) fail(*why, nullptr, nullptr);
      return;
    }
    try {
      move(*exchange);
    } catch (const Failure& failure) {
      fail(failure, nullptr, exchange);
      return;
    } catch (const std::exception& error) {  // in what was to compute the payload
      const Failure failure = make_failure({members_.rank()}, "failed (" + first_line(error.what()) + ")",
                                           phase_name(exchange->phase()), exchange->label(), members_.rank());
      fail(publish(failure), std::current_exception(), exchange);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(shared_->mutex);
      shared_->current.end_ns = now_ns();
      shared_->ended[sequence_ % kRemembered] = shared_->current;
      shared_->state = State::kIdle;
      ++sequence_;
    }
    exchange->finish();
  }
}

// Everything in flight and to come fails: with `error`, or else the first one known, or else `failure`.
void HostLane::fail(const Failure& failure, std::exception_ptr error,
                    const std::shared_ptr<Exchange>& current) {
  tell_once(failure);
  peers_->told();
  if (!failure.leaving) peers_->settle();
  std::deque<std::shared_ptr<Exchange>> rest;
  {
    std::lock_guard<std::mutex> lock(shared_->mutex);
    if (!shared_->ending) shared_->ending = failure;
    if (!shared_->error) shared_->error = error ? error : std::make_exception_ptr(failure);
    shared_->state = State::kFailed;
    if (!error) error = shared_->error;
    rest.swap(shared_->queue);
  }
  if (current) current->fail(error);
  for (const auto& exchange : rest) exchange->fail(error);
}

LaneRecord HostLane::record() {
  static const char* const kNames[] = {"idle", "preparing", "moving", "failed"};
  LaneRecord record;
  std::lock_guard<std::mutex> lock(shared_->mutex);
  record.name = name_;
  record.state = kNames[static_cast<size_t>(shared_->state)];
  record.current = shared_->current;
  for (int peer = 0; peer < peers_->world(); ++peer) {
    const PeerProgress& progress = progress_[static_cast<size_t>(peer)];
    if (peer == members_.rank() || progress.moved_ns == 0) continue;
    record.peers.push_back({peer, progress.sent, progress.received, progress.moved_ns});
  }
  uint32_t sequence = sequence_ + (shared_->state == State::kIdle ? 0 : 1);
  for (const auto& exchange : shared_->queue) {
    record.queued.emplace_back();
    describe(*exchange, sequence++, record.queued.back());
  }
  for (size_t i = 0; i < kRemembered; ++i) {
    const ExchangeRecord& ended = shared_->ended[(sequence_ + i) % kRemembered];
    if (ended.end_ns != 0) record.ended.push_back(ended);
  }
  return record;
}

}  // namespace dear
