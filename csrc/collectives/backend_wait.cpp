#include "collectives/backend_wait.h"

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#include "collectives/at_exit.h"
#include "collectives/interrupt.h"

namespace dear {
namespace {

using Works = std::vector<c10::intrusive_ptr<c10d::Work>>;

std::exception_ptr outcome(const Works& works) {
  try {
    for (const auto& work : works) work->wait();
    return nullptr;
  } catch (...) {
    return std::current_exception();
  }
}

}  // namespace

struct BackendWait::State {
  std::mutex mutex;
  std::condition_variable changed;
  bool ended = false;
  std::exception_ptr error;

  void end(std::exception_ptr with) {
    std::lock_guard<std::mutex> lock(mutex);
    error = std::move(with);
    ended = true;
    changed.notify_all();
  }
};

BackendWait::BackendWait(Works works) : state_(std::make_shared<State>()) {
  const bool over =
      std::all_of(works.begin(), works.end(), [](const auto& work) { return work->isCompleted(); });
  if (over) {
    state_->end(outcome(works));
    return;
  }
  std::thread([state = state_, works = std::move(works)]() mutable {
    AtExit at_exit([] {}, [] {});
    std::exception_ptr error = outcome(works);
    // Who waits is to have the last reference. Behind the interpreter's end they are left.
    if (!at_exit.cancel([&works] { works.clear(); })) [[maybe_unused]]
      auto* left = new Works(std::move(works));
    state->end(std::move(error));
  }).detach();
}

void BackendWait::await_end() const {
  const auto state = state_;  // a signal's handler may wait, too, and drop this then
  std::unique_lock<std::mutex> lock(state->mutex);
  wait_interruptibly(state->changed, lock, [&state] { return state->ended; });
}

bool BackendWait::ended() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->ended;
}

void BackendWait::rethrow() const {
  std::lock_guard<std::mutex> lock(state_->mutex);
  if (state_->error) std::rethrow_exception(state_->error);
}

}  // namespace dear
