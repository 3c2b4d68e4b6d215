#pragma once

#include <c10/core/Stream.h>

#include <atomic>
#include <deque>
#include <thread>

#include "collectives/at_exit.h"
#include "collectives/fork.h"
#include "collectives/lane.h"

namespace dear {

// The lanes of one compressor, and the thread on which its host tensors are decoded.
//
// Note [One lane for each stage]
// The first exchange of every group goes through lane 0, the second through lane 1, and so on; in each lane
// groups follow each other in an order on which all ranks agree: that in which DDP delivers buckets, or, for
// the exchanges of the second phase under DeAR, that in which the next forward pass wants them. No lane's
// order depends on when something happened to be ready, whatever the number of buckets - which is what goes
// wrong when collectives are started inside future callbacks. What is computed between two exchanges is
// computed on the thread of the second one's lane, when the lane reaches it (Note [Deferred exchanges]).
//
// On a GPU nothing waits: everything is queued, in order, on streams of the pipeline's own.
//
// Note [Few streams]
// What is queued on a stream waits there for exchanges, most of a step long. A GPU has few queues for its
// streams (CUDA_DEVICE_MAX_CONNECTIONS, 8 where nothing is said, fewer under MPS), and streams that share one
// wait for each other: with a stream for each group, on which its decoding was queued as soon as its last
// exchange was, the training stream stood still until the last group had been decoded. So groups take turns
// on kStreams streams: enough for one to be encoded, one exchanged and one decoded. They are of high
// priority, since exchanges wait for their short kernels. And under DeAR decoding is queued when somebody
// waits for the group, who waits for its exchange in any case.
//
// Threads: exchanges are submitted by one thread, the one that runs backward or the training thread.
class Pipeline {
 public:
  // `lanes` and `all_to_alls` by stage; of the latter those may be null, or missing, that no codec wants.
  // `rank`: of the process group, of whose ranks a lane may have some.
  Pipeline(std::vector<std::shared_ptr<Lane>> lanes, std::vector<std::shared_ptr<Lane>> all_to_alls,
           at::Device device, int rank);
  // Lets what is in flight fail first: the decoding thread may be waiting for it.
  ~Pipeline();

  Lane& lane(Phase phase, size_t stage) const;
  // On a GPU, the stream of the group that is made next; see Note [Few streams].
  c10::Stream next_stream();
  size_t stages() const { return lanes_.size(); }
  at::Device device() const { return device_; }
  int rank() const { return rank_; }

  // Steps that have begun.
  int64_t steps() const { return steps_; }
  void set_steps(int64_t steps) { steps_ = steps; }
  // Lets the lanes go, which others may use from now on; nothing is in flight.
  void release() { released_ = true; }
  // Nothing of the step before may be under way.
  void begin_step();

  // Runs `job` on the decoding thread, behind those that were given before. Host tensors only.
  void decode_later(std::function<void()> job);
  // Makes every exchange in flight and to come fail, so that no peer waits for us longer than it must.
  void abort(const std::string& reason);

  // What this rank has sent and computed, since it was made, and since the step began.
  struct Counts {
    int64_t bytes_sent = 0;
    int64_t encode_ns = 0;   // on the threads of backward
    int64_t between_ns = 0;  // between exchanges, on the lanes' threads
    int64_t decode_ns = 0;   // on the decoding thread
  };
  Counts counts() const { return {bytes_sent, encode_ns, between_ns, decode_ns}; }
  Counts counts_of_step() const { return minus(counts(), at_begin_); }
  Counts counts_of_last_step() const { return last_step_; }

  std::atomic<int64_t> bytes_sent{0};
  std::atomic<int64_t> encode_ns{0};
  std::atomic<int64_t> between_ns{0};
  std::atomic<int64_t> decode_ns{0};

 private:
  void serve();
  void end(const std::string& reason);
  void join();
  static Counts minus(const Counts& a, const Counts& b);

  std::vector<std::shared_ptr<Lane>> lanes_;
  std::vector<std::shared_ptr<Lane>> all_to_alls_;
  const at::Device device_;
  const int rank_;
  static constexpr size_t kStreams = 3;
  std::vector<c10::Stream> streams_;
  size_t groups_ = 0;  // that have been given a stream
  bool released_ = false;
  int64_t steps_ = 0;
  Counts at_begin_;
  Counts last_step_;

  struct Decoding {
    std::mutex mutex;
    std::condition_variable work;
    std::deque<std::function<void()>> jobs;
    bool stopping = false;
    std::thread thread;
  };
  HomeProcess home_;
  HomeOnly<Decoding> decoding_;  // see Note [Forked children]
  std::optional<AtExit> at_exit_;
};

}  // namespace dear
