#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <deque>
#include <thread>

#include "collectives/at_exit.h"
#include "collectives/lane.h"
#include "collectives/members.h"
#include "collectives/peers.h"
#include "collectives/transfer.h"

namespace dear {

// A lane that moves host tensors over connections of its own, on a thread of its own. What it moves and how
// is its subclass's business, as are the connections. See Note [Who is to blame] and Note [Forked children].
//
// Threads: any thread may submit, abort or destroy; the exchanges themselves run on the lane's thread.
class HostLane : public Lane, private Peers::Member, private TransferHost {
 public:
  void submit(const std::shared_ptr<Exchange>& exchange) override;
  // Tells the neighbours that this rank leaves, with `reason` where something is in flight or it begins with
  // this rank's name ("Rank 1 ...").
  void abort(const std::string& reason) override;
  std::optional<Failure> investigate(const std::string& phase, const std::string& label,
                                     std::chrono::milliseconds patience) override {
    return peers_->investigate(phase, label, patience);
  }
  int rank() const override { return rank_; }
  int world() const override { return world_; }

 protected:
  // `name` is for errors and traces. A peer from which nothing comes for `timeout` is given up. `ranks`: the
  // members, none for all of `peers`.
  HostLane(std::shared_ptr<Peers> peers, std::string name, std::chrono::milliseconds timeout,
           std::vector<int> ranks);
  ~HostLane() override;

  // Called at the end of a subclass's constructor, and at the beginning of its destructor, which lets the
  // exchange in flight fail and joins the thread.
  void start();
  void stop();

  // On the lane's thread. Moves one exchange that make_exchange() made. Throws a Failure, which it has
  // published and told the neighbours before, and shown them that nothing more will come.
  virtual void transfer(Exchange& exchange, const TransferContext& context) = 0;
  // Tells the neighbours, none of whom is in the middle of a frame, and shows them that nothing more will
  // come. On any thread.
  virtual void tell(FrameType type, const Failure& failure) = 0;
  // Tells the neighbours, none of whom is in the middle of a frame, for whom this process waits: a remark.
  virtual void remark(int culprit) = 0;
  // News that has come and that nobody has read, as far as it can be had without reading data.
  virtual std::optional<Failure> find_news() = 0;
  // The ranks whose connections have ended without a word.
  virtual std::vector<int> find_gone() const = 0;
  // There is a connection to `peer` that has not ended.
  virtual bool open_to(int peer) const = 0;
  // No connection stands, and nothing that came is unread.
  virtual bool all_hung_up() const = 0;
  virtual std::vector<int> connections() const = 0;  // descriptors

  const std::shared_ptr<Peers> peers_;
  const Members members_;
  const int rank_;  // place in the lane, and how many members it has
  const int world_;
  const std::chrono::milliseconds timeout_;

 private:
  static constexpr size_t kRemembered = 16;  // exchanges that have ended
  enum class State { kIdle, kPreparing, kMoving, kFailed };

  struct Shared {
    std::mutex mutex;
    std::condition_variable work;
    std::deque<std::shared_ptr<Exchange>> queue;
    bool stopping = false;
    std::optional<Failure> ending;
    std::exception_ptr error;  // the first failure; everything after it fails alike
    State state = State::kIdle;
    ExchangeRecord current;
    std::array<ExchangeRecord, kRemembered> ended;  // by sequence
    std::mutex wire;                                // held while frames are under way
    int remarked;                                   // the neighbours were told of whom; this rank: of nobody
    std::thread thread;
  };

  void run();
  void join();
  std::shared_ptr<Exchange> next();
  void move(Exchange& exchange);
  void fail(const Failure& failure, std::exception_ptr error, const std::shared_ptr<Exchange>& current);
  void end(const Failure& ending, std::exception_ptr error);
  // Tells, unless it has been done or frames are under way. Returns whether it has been done.
  bool tell_once(const Failure& failure);

  void hear(const Failure& news) override;
  void hear_waiting(int culprit) override;
  bool told() const override { return told_; }
  std::optional<Failure> look() override;
  std::vector<int> gone() override;
  bool reaches(int rank) override { return open_to(rank); }
  bool cut_off() override { return all_hung_up(); }
  LaneRecord record() override;

  std::optional<Failure> ending() override;
  Failure publish(const Failure& failure) override;
  Failure explain_loss(int peer, const std::string& what, const Exchange& exchange) override;
  std::optional<Failure> held_up(int culprit) override { return peers_->held_up(culprit, this); }
  PeerProgress& progress(int peer) override { return progress_[static_cast<size_t>(peer)]; }

  const std::string name_;
  HomeProcess home_;
  HomeOnly<Shared> shared_;
  uint32_t sequence_ = 0;
  bool cut_short_ = false;  // a transfer was: what its peers sent for it may be unread
  int wake_ = -1;           // an eventfd: written to end a poll at once
  std::atomic<bool> told_{false};
  std::vector<PeerProgress> progress_;  // by rank
  std::optional<AtExit> at_exit_;
};

}  // namespace dear
