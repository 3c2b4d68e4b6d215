#include "collectives/at_exit.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <utility>
#include <vector>

#include "collectives/fork.h"

namespace dear {

struct AtExit::Entry {
  HomeProcess home;
  std::mutex mutex;  // held while one of them runs
  std::function<void()> end;
  std::function<void()> join;
  bool stopped = false;
};

namespace {

struct Registry {
  HomeProcess home;
  std::mutex mutex;
  std::vector<std::shared_ptr<AtExit::Entry>> entries;
  bool over = false;
};

// Of this process: a forked child begins anew, and leaves what it has of its parent's (Note [Forked
// children]).
Registry& registry() {
  static std::atomic<Registry*> current{new Registry};
  Registry* found = current.load();
  while (found->home.away()) {
    auto mine = std::make_unique<Registry>();
    if (current.compare_exchange_strong(found, mine.get())) found = mine.release();
  }
  return *found;
}

}  // namespace

AtExit::AtExit(std::function<void()> end, std::function<void()> join) : entry_(std::make_shared<Entry>()) {
  entry_->end = std::move(end);
  entry_->join = std::move(join);
  Registry& here = registry();
  const std::lock_guard<std::mutex> lock(here.mutex);
  entry_->stopped = here.over;
  here.entries.push_back(entry_);
}

bool AtExit::cancel(const std::function<void()>& last) {
  if (entry_->home.away()) return false;
  bool mine = false;
  {
    const std::lock_guard<std::mutex> lock(entry_->mutex);
    mine = !entry_->stopped;
    if (mine) last();  // still listed: stop_threads() waits for it
    entry_->stopped = true;
  }
  Registry& here = registry();
  const std::lock_guard<std::mutex> lock(here.mutex);
  here.entries.erase(std::remove(here.entries.begin(), here.entries.end(), entry_), here.entries.end());
  return mine;
}

void stop_threads() {
  std::vector<std::shared_ptr<AtExit::Entry>> entries;
  {
    Registry& here = registry();
    const std::lock_guard<std::mutex> lock(here.mutex);
    here.over = true;
    entries = here.entries;
  }
  for (const auto& entry : entries) {
    // Not waited for where it is being cancelled: its thread may wait for one that is told next.
    const std::unique_lock<std::mutex> lock(entry->mutex, std::try_to_lock);
    if (lock.owns_lock() && !entry->stopped) entry->end();
  }
  for (const auto& entry : entries) {
    const std::lock_guard<std::mutex> lock(entry->mutex);
    if (!std::exchange(entry->stopped, true)) entry->join();
  }
}

}  // namespace dear
