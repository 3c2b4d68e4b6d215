#pragma once

#include <atomic>
#include <deque>
#include <thread>

#include "collectives/links.h"
#include "collectives/ring_plan.h"

namespace dear {

// A lane that moves host tensors round a ring of TCP connections, on a thread of its own.
//
// Threads: any thread may submit, abort or destroy; the exchanges themselves run on the lane's thread. The
// destructor lets the exchange in flight fail, joins the thread and closes the connections.
class RingLane : public Lane {
 public:
  // `key` must be the same on all ranks and new for every ring on this store. A peer from which nothing comes
  // for `timeout` is given up.
  RingLane(const c10::intrusive_ptr<c10d::Store>& store, const std::string& key, int rank, int world,
           std::chrono::milliseconds timeout);
  ~RingLane() override;

  std::shared_ptr<Exchange> make_exchange(Phase phase, Reduction reduction, std::vector<Part> parts,
                                          std::string label) override;
  void submit(const std::shared_ptr<Exchange>& exchange) override;
  void abort(const std::string& reason) override;
  int rank() const override { return rank_; }
  int world() const override { return world_; }

 private:
  void run();
  void fail_all(std::exception_ptr error, std::shared_ptr<Exchange> current);

  const int rank_;
  const int world_;
  const std::chrono::milliseconds timeout_;
  std::unique_ptr<RingLinks> links_;
  std::vector<char> scratch_;
  uint32_t sequence_ = 0;
  int wake_ = -1;  // an eventfd: written to end a poll at once

  std::mutex mutex_;
  std::condition_variable work_;
  std::deque<std::shared_ptr<Exchange>> queue_;
  bool stopping_ = false;
  std::exception_ptr error_;  // the first failure; everything after it fails alike
  std::atomic<bool> aborted_{false};
  std::string abort_reason_;
  std::thread thread_;
};

}  // namespace dear
