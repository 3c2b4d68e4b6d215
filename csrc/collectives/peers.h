#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "collectives/failure.h"
#include "collectives/fork.h"
#include "collectives/frame.h"
#include "collectives/hello.h"
#include "collectives/recorder.h"

namespace dear {

// Note [Who is to blame]
// A rank that waits sees only its neighbour wait, and would blame it; a rank that fails ends, and its
// neighbours would blame it. So news of a failure runs ahead of its consequences:
//  - A rank that fails tells the neighbours on every one of its lanes whom it blames and why, before any of
//    its connections is shut and before its program hears of it. They pass it on likewise.
//  - The first news wins in a process: whatever its lanes find later, they say what came first.
//  - A rank that leaves in good order says so on its connections (FrameType::kLeft), which is only told to
//    who still waits for it.
//  - A connection that ends without a word is another's death, or the network. The connections of all lanes
//    are looked at until nothing changes any more: where some of them to that rank stand, it has not
//    ended, and both are named; where none of them to any rank stands, this rank is the one that is cut off.
//    Only then are the others told.
//  - A lane that is starved for a quarter of the timeout says for whom it waits. In a ring it tells the next
//    rank, in place of the frame that does not come; and the other lanes of its process, where they have
//    nothing under way, tell their neighbours, who may wait for this rank there (a remark, see frame.h). Who
//    hears so waits for whom the other one waits for, and says so in its turn: whoever gives up first, on
//    whichever lane, names the rank that holds up all of them.

// What the lanes of one process that serve the same ranks have in common: who they are, how their frames are
// guarded, and the first news of a failure.
//
// Threads: any. A lane joins when it can be told, and leaves before it is destroyed.
class Peers {
 public:
  // A lane, as the others see it.
  class Member {
   public:
    virtual ~Member() = default;
    // There is news. Tells the neighbours at once where nothing is under way; otherwise the lane's own thread
    // will. Must not block for long, nor call Peers.
    virtual void hear(const Failure& news) = 0;
    // Another lane of this process waits for rank `culprit`; for nobody any more where that is this rank.
    // Tells the neighbours, once, where nothing is under way. Must not block for long, nor call Peers.
    virtual void hear_waiting(int culprit) = 0;
    // The neighbours have been told, or cannot be.
    virtual bool told() const = 0;
    // News that has come and that nobody has read, as far as it can be had without disturbing what is under
    // way.
    virtual std::optional<Failure> look() = 0;
    // The ranks whose connections have ended without a word, as far as that can be seen likewise.
    virtual std::vector<int> gone() = 0;
    // There is a connection to `rank` that has not ended.
    virtual bool reaches(int rank) = 0;
    // All its connections have ended, and nothing that came on them is unread.
    virtual bool cut_off() = 0;
    virtual LaneRecord record() = 0;
  };

  // `address`: numeric, where this rank listens. `key`: 16 bytes made of the shared key, or empty.
  // `recorder`: where the flight recorder writes, or empty. See recorder.h and Note [Who may join].
  Peers(int rank, int world, std::string address, bool check_contents, const std::string& key,
        std::string recorder);

  int rank() const { return rank_; }
  int world() const { return world_; }
  const std::string& address() const { return address_; }
  bool keyed() const { return keyed_; }
  const Key& key() const { return key_; }
  const FrameCheck& check() const { return check_; }

  void join(Member* member);
  void leave(Member* member);

  // Makes `failure`, which lane `from` has found, the news, and tells the other lanes, unless there is news
  // already. Returns the news.
  Failure publish(const Failure& failure, const Member* from);
  bool failed();
  // Lane `from` is held up by rank `culprit`, or, where that is this rank, by nobody any more: the other
  // lanes say so. Returns the news, or what one of them finds when it looks: idle, it reads nothing by
  // itself.
  std::optional<Failure> held_up(int culprit, const Member* from);
  // What to say of a connection to `rank` that has ended without a word, as lane `asking` sees it: there may
  // be news, or it may turn out that the rank lives. `what` is what is said of a rank that has ended. Takes a
  // tenth of a second where it has ended, and up to `patience` where other connections to it stand.
  Failure explain_loss(int rank, const std::string& what, const std::string& phase, const std::string& label,
                       std::chrono::milliseconds patience, const Member* asking);
  // For when something else than a lane has failed, and idle lanes, which read nothing, may know whose fault
  // it is: waits for news, or for a connection that ends, for up to `patience`; publishes and returns the
  // news. `phase` and `label` say what has failed. Throws what check_interrupt() throws.
  std::optional<Failure> investigate(const std::string& phase, const std::string& label,
                                     std::chrono::milliseconds patience);
  // To be called before a program hears of a failure: waits until every lane has told its neighbours, for
  // two seconds at most, and writes the flight recorder's file.
  void settle();
  // A lane has told its neighbours.
  void told();

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    std::vector<Member*> members;
    std::optional<Failure> news;
    bool recorded = false;
  };

  // The news, or what another lane than `asking` finds when it looks.
  std::optional<Failure> search(const Member* asking);
  std::vector<int> gone();
  // The ranks to which some lane has a connection that stands.
  std::vector<int> reached();
  bool cut_off();

  const int rank_;
  const int world_;
  const std::string address_;
  const bool keyed_;
  Key key_{};
  FrameCheck check_;
  const std::string recorder_;
  HomeProcess home_;
  HomeOnly<State> state_;
};

}  // namespace dear
