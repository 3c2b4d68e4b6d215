#include "collectives/host_lane.h"

#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

namespace dear {

HostLane::HostLane(int rank, int world, std::chrono::milliseconds timeout)
    : rank_(rank), world_(world), timeout_(timeout), wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

HostLane::~HostLane() { ::close(wake_); }

void HostLane::start(const std::string& thread_name) {
  thread_ = std::thread([this] { run(); });
  // The kernel keeps 15 characters.
  ::pthread_setname_np(thread_.native_handle(), thread_name.substr(0, 15).c_str());
}

void HostLane::stop() {
  abort("The communication lane was shut down while an exchange was in flight.");
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  work_.notify_all();
  thread_.join();
}

void HostLane::submit(const std::shared_ptr<Exchange>& exchange) {
  exchange->begin();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) {
      queue_.push_back(exchange);
      work_.notify_one();
      return;
    }
  }
  exchange->fail(error_);
}

void HostLane::abort(const std::string& reason) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (aborted_) return;
    abort_reason_ = reason;
    aborted_ = true;
    if (!error_) error_ = std::make_exception_ptr(std::runtime_error(reason));
  }
  const uint64_t one = 1;
  [[maybe_unused]] const auto written = ::write(wake_, &one, sizeof(one));
  work_.notify_all();
}

void HostLane::fail_all(std::exception_ptr error, std::shared_ptr<Exchange> current) {
  std::deque<std::shared_ptr<Exchange>> rest;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = error;
    rest.swap(queue_);
  }
  if (current) current->fail(error);
  for (const auto& exchange : rest) exchange->fail(error);
}

void HostLane::run() {
  const auto abort_reason = [this]() -> std::string {
    std::lock_guard<std::mutex> lock(mutex_);
    return aborted_ ? abort_reason_ : std::string();
  };
  while (true) {
    std::shared_ptr<Exchange> exchange;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      work_.wait(lock, [this] { return stopping_ || !queue_.empty() || aborted_; });
      if (aborted_) {
        const std::exception_ptr error = error_;
        lock.unlock();
        hang_up();
        fail_all(error, nullptr);
        return;
      }
      if (stopping_) return;
      exchange = std::move(queue_.front());
      queue_.pop_front();
    }
    try {
      Exchange& moved = exchange->take_turn();
      exchange->started();
      transfer(moved, {rank_, world_, timeout_, sequence_, wake_, abort_reason});
      ++sequence_;
      exchange->finish();
    } catch (...) {
      hang_up();
      fail_all(std::current_exception(), exchange);
      return;
    }
  }
}

}  // namespace dear
