#include "collectives/peers.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "collectives/interrupt.h"

namespace dear {
namespace {

// How long nothing has to change until it is clear who has lost whom. A process that ends, and a network that
// is cut, end connections one after another.
constexpr std::chrono::milliseconds kCalm{100};
constexpr std::chrono::milliseconds kOneSecond{1000};  // with one that may live, where nothing waits for it

}  // namespace

Peers::Peers(int rank, int world, std::string address, bool check_contents, const std::string& key,
             std::string recorder)
    : rank_(rank),
      world_(world),
      address_(std::move(address)),
      keyed_(!key.empty()),
      recorder_(std::move(recorder)) {
  if (keyed_ && key.size() != key_.size()) throw std::invalid_argument("key must have 16 bytes, or none.");
  std::copy(key.begin(), key.end(), key_.begin());
  check_.contents = check_contents;
  if (keyed_) check_.seed = static_cast<uint32_t>(keyed_hash(key_, "checksum"));
}

void Peers::join(Member* member) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->members.push_back(member);
  if (state_->news) member->hear(*state_->news);
}

void Peers::leave(Member* member) {
  if (home_.away()) return;
  std::lock_guard<std::mutex> lock(state_->mutex);
  auto& members = state_->members;
  members.erase(std::remove(members.begin(), members.end(), member), members.end());
  state_->changed.notify_all();
}

Failure Peers::publish(const Failure& failure, const Member* from) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  if (state_->news) return *state_->news;
  state_->news = failure;
  for (Member* member : state_->members) {
    if (member != from) member->hear(failure);
  }
  return failure;
}

bool Peers::failed() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->news.has_value();
}

std::optional<Failure> Peers::held_up(int culprit, const Member* from) {
  if (auto found = search(from)) return found;
  std::lock_guard<std::mutex> lock(state_->mutex);
  for (Member* member : state_->members) {
    if (member != from) member->hear_waiting(culprit);
  }
  return std::nullopt;
}

std::optional<Failure> Peers::search(const Member* asking) {
  std::lock_guard<std::mutex> lock(state_->mutex);
  if (state_->news) return state_->news;
  for (Member* member : state_->members) {
    if (member == asking) continue;
    if (auto found = member->look()) return found;
  }
  return std::nullopt;
}

std::vector<int> Peers::gone() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  for (Member* member : state_->members) {
    const std::vector<int> ranks = member->gone();
    if (!ranks.empty()) return ranks;
  }
  return {};
}

std::vector<int> Peers::reached() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  std::vector<int> ranks;
  for (int rank = 0; rank < world_; ++rank) {
    const auto reaches = [rank](Member* member) { return member->reaches(rank); };
    if (std::any_of(state_->members.begin(), state_->members.end(), reaches)) ranks.push_back(rank);
  }
  return ranks;
}

bool Peers::cut_off() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  return std::all_of(state_->members.begin(), state_->members.end(),
                     [](Member* member) { return member->cut_off(); });
}

Failure Peers::explain_loss(int rank, const std::string& what, const std::string& phase,
                            const std::string& label, std::chrono::milliseconds patience,
                            const Member* asking) {
  const auto failure = [&](const std::vector<int>& ranks, const std::string& complaint) {
    return make_failure(ranks, complaint, phase.c_str(), label, rank_);
  };
  const auto start = std::chrono::steady_clock::now();
  auto changed = start;
  std::vector<int> before = reached();
  while (true) {
    if (const auto found = search(asking)) return *found;
    const std::vector<int> now_reached = reached();
    const auto now = std::chrono::steady_clock::now();
    if (now_reached != before) changed = now;
    before = now_reached;
    const bool lives = std::find(before.begin(), before.end(), rank) != before.end();
    if (now - changed >= kCalm && !lives) {
      return world_ > 2 && cut_off() ? failure({rank_}, complaint::alone()) : failure({rank}, what);
    }
    if (now - start >= std::max(patience, kCalm) && lives) {
      return failure({std::min(rank, rank_), std::max(rank, rank_)}, complaint::apart());
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

std::optional<Failure> Peers::investigate(const std::string& phase, const std::string& label,
                                          std::chrono::milliseconds patience) {
  const auto deadline = std::chrono::steady_clock::now() + patience;
  while (true) {
    std::optional<Failure> found = search(nullptr);
    if (!found) {
      const std::vector<int> ranks = gone();
      if (!ranks.empty()) {
        found = explain_loss(ranks.front(), complaint::closed(), phase, label, kOneSecond, nullptr);
      }
    }
    if (found) {
      const Failure news = publish(*found, nullptr);
      settle();
      return news;
    }
    if (std::chrono::steady_clock::now() >= deadline) return std::nullopt;
    check_interrupt();
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

void Peers::settle() {
  std::unique_lock<std::mutex> lock(state_->mutex);
  state_->changed.wait_for(lock, std::chrono::seconds(2), [this] {
    return std::all_of(state_->members.begin(), state_->members.end(),
                       [](const Member* member) { return member->told(); });
  });
  if (recorder_.empty() || state_->recorded || !state_->news) return;
  state_->recorded = true;
  std::vector<LaneRecord> records;
  for (Member* member : state_->members) records.push_back(member->record());
  write_record(recorder_, rank_, world_, state_->news->what(), records);
}

void Peers::told() {
  std::lock_guard<std::mutex> lock(state_->mutex);
  state_->changed.notify_all();
}

}  // namespace dear
