#pragma once

#include <atomic>
#include <deque>
#include <thread>

#include "collectives/exchange.h"

namespace dear {

// What a transfer needs to know of the lane it runs in.
struct TransferContext {
  int rank;
  int world;
  std::chrono::milliseconds timeout;
  uint32_t sequence;                          // of this exchange in its lane
  int wake_fd;                                // readable when `abort_reason` has something to say
  std::function<std::string()> abort_reason;  // empty while the lane is wanted
};

// A lane that moves host tensors over connections of its own, on a thread of its own. What it moves and how
// is its subclass's business, as are the connections.
//
// Threads: any thread may submit, abort or destroy; the exchanges themselves run on the lane's thread.
class HostLane : public Lane {
 public:
  void submit(const std::shared_ptr<Exchange>& exchange) override;
  void abort(const std::string& reason) override;
  int rank() const override { return rank_; }
  int world() const override { return world_; }

 protected:
  // A peer from which nothing comes for `timeout` is given up.
  HostLane(int rank, int world, std::chrono::milliseconds timeout);
  ~HostLane() override;

  // Called at the end of a subclass's constructor, and at the beginning of its destructor, which lets the
  // exchange in flight fail and joins the thread.
  void start(const std::string& thread_name);
  void stop();

  // On the lane's thread. Moves one exchange that make_exchange() made; throws one sentence when that fails.
  virtual void transfer(Exchange& exchange, const TransferContext& context) = 0;
  // Lets peers see at once that this lane will never send again.
  virtual void hang_up() = 0;

  const int rank_;
  const int world_;
  const std::chrono::milliseconds timeout_;

 private:
  void run();
  void fail_all(std::exception_ptr error, std::shared_ptr<Exchange> current);

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
