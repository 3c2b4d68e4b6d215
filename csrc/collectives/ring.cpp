#include "collectives/ring.h"

#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "collectives/accumulate.h"
#include "collectives/ring_transfer.h"

namespace dear {
namespace {

class RingExchange : public Exchange {
 public:
  RingExchange(Phase phase, Reduction reduction, std::vector<Part> parts, std::string label, int rank,
               int world)
      : Exchange(phase, reduction, std::move(parts), std::move(label)),
        plan_(make_ring_plan(*this, rank, world)) {}
  const RingPlan& plan() const { return plan_; }

 private:
  RingPlan plan_;
};

}  // namespace

RingLane::RingLane(const c10::intrusive_ptr<c10d::Store>& store, const std::string& key, int rank, int world,
                   std::chrono::milliseconds timeout)
    : rank_(rank), world_(world), timeout_(timeout), wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (world_ > 1) links_ = std::make_unique<RingLinks>(store, key, rank, world, timeout);
  thread_ = std::thread([this] { run(); });
  // The kernel keeps 15 characters.
  ::pthread_setname_np(thread_.native_handle(), ("dear " + key).substr(0, 15).c_str());
}

RingLane::~RingLane() {
  abort("The communication lane was shut down while an exchange was in flight.");
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  work_.notify_all();
  thread_.join();
  ::close(wake_);
}

std::shared_ptr<Exchange> RingLane::make_exchange(Phase phase, Reduction reduction, std::vector<Part> parts,
                                                  std::string label) {
  TORCH_CHECK(phase != Phase::kAllToAll, "A ring has no all-to-all: use the native collectives.");
  for (const Part& part : parts) {
    TORCH_CHECK(part.full.device().is_cpu(), "The ring moves host tensors, and one on ", part.full.device(),
                " was given: use the native collectives of that device's backend.");
    if (phase == Phase::kReduceScatter) check_summable(part.full.scalar_type());
  }
  return std::make_shared<RingExchange>(phase, reduction, std::move(parts), std::move(label), rank_, world_);
}

void RingLane::submit(const std::shared_ptr<Exchange>& exchange) {
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

void RingLane::abort(const std::string& reason) {
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

void RingLane::fail_all(std::exception_ptr error, std::shared_ptr<Exchange> current) {
  std::deque<std::shared_ptr<Exchange>> rest;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = error;
    rest.swap(queue_);
  }
  if (current) current->fail(error);
  for (const auto& exchange : rest) exchange->fail(error);
}

void RingLane::run() {
  const auto abort_reason = [this]() -> std::string {
    std::lock_guard<std::mutex> lock(mutex_);
    return aborted_ ? abort_reason_ : std::string();
  };
  // A lane that has failed will never send again: its neighbours shall see that now, not when they time out.
  const auto hang_up = [this] {
    if (!links_) return;
    ::shutdown(links_->to_next(), SHUT_RDWR);
    ::shutdown(links_->from_prev(), SHUT_RDWR);
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
      const auto& plan = static_cast<const RingExchange&>(moved).plan();
      if (world_ == 1) {
        for (const Part& part : moved.parts()) {
          if (moved.phase() == Phase::kReduceScatter && part.shard.data_ptr() != part.full.data_ptr())
            part.shard.copy_(part.full);
        }
      } else if (!plan.inbound.empty() || !plan.outbound.empty()) {
        run_ring_transfer(moved, plan,
                          {links_.get(), rank_, world_, timeout_, sequence_, wake_, abort_reason, &scratch_});
      }
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
