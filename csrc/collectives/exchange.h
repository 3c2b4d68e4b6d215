#pragma once

#include <ATen/ATen.h>

#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "collectives/fork.h"
#include "collectives/ownership.h"

namespace dear {

enum class Phase { kReduceScatter, kAllGather, kAllToAll };
enum class Reduction { kSum, kAverage };

const char* phase_name(Phase phase);

// One buffer of an exchange. `full` has every rank's chunk, `shard` is this rank's; both are flat and
// contiguous. A reduce-scatter reads `full` and writes `shard`; an all-gather writes `full`, where this
// rank's chunk must already stand (`shard` is then unused). `shard` may alias this rank's chunk of `full`,
// where that is one range. Chunks are those of `owners`, or equal ones where there is none.
// An all-to-all sends chunk r of `full` to rank r, and `shard`, as long as `full`, gets what came from each.
struct Part {
  at::Tensor full;
  at::Tensor shard;
  std::shared_ptr<const Ownership> owners = nullptr;
};

// Whether the part's chunks are others than equal ones.
bool is_uneven(const Part& part);
// Who owns what of the part among `world` ranks.
std::shared_ptr<const Ownership> owners_of(const Part& part, int world);

// Throws one sentence when the part's lengths are not those of an all-to-all among `world` ranks.
void check_all_to_all(const Part& part, int world);

// One half of an all-reduce, over one or more buffers moved together. Built once for a fusion group and
// submitted every step, so that steady state allocates nothing.
//
// Note [Deferred exchanges]
// The order in a lane is equal on all ranks, so exchanges are queued as soon as the order is agreed on, often
// before there is anything to move. A deferred exchange reserves a queue position. When the lane reaches it,
// its callback waits for what must come first, builds the payload, and returns the exchange to move. The
// callback runs on the thread that moves the data.
//
// Threads: submitted and waited on by the training thread; the lane's thread moves the data and calls
// finish() or fail(). A backend lane overrides wait().
class Exchange {
 public:
  // `world`: how many ranks take part.
  Exchange(Phase phase, Reduction reduction, std::vector<Part> parts, std::string label, int world);
  virtual ~Exchange() = default;

  Phase phase() const { return phase_; }
  Reduction reduction() const { return reduction_; }
  const std::vector<Part>& parts() const { return parts_; }
  // Names the exchange in errors and traces: "fusion group 3".
  const std::string& label() const { return label_; }

  // Blocks until the exchange has ended (for device tensors: until the current stream is ordered behind it)
  // and rethrows its failure. Returns at once when it was never submitted. Must be called without the GIL.
  // Throws in a forked child, and what check_interrupt() throws.
  virtual void wait();
  // True once nothing is in flight, also after a failure.
  virtual bool done();

  // Makes this a deferred exchange. `build` is called when the lane reaches it, before the first byte is
  // sent; it returns the exchange to move, or null for this one. See Note [Deferred exchanges].
  using Build = std::function<std::shared_ptr<Exchange>()>;
  void defer(Build build) { build_ = std::move(build); }
  // The exchange to move, now that the lane has reached this one. Only lanes call it.
  Exchange& built() {
    built_ = build_ ? build_() : nullptr;
    return built_ ? *built_ : *this;
  }

  int64_t bytes() const;
  // What this rank sends.
  virtual int64_t bytes_sent() const { return bytes() * (world_ - 1) / world_; }
  // What ranks compare to see that they are in the same exchange: of phase, reduction, lengths,
  // types and owners.
  uint32_t signature() const;
  virtual int64_t start_ns() const { return start_ns_; }
  virtual int64_t end_ns() const { return end_ns_; }

  void begin();                         // at submission
  void started();                       // at the first byte
  void finish();                        // at the last byte
  void fail(std::exception_ptr error);  // instead of finish()

 protected:
  Phase phase_;
  Reduction reduction_;
  std::vector<Part> parts_;
  std::string label_;
  int world_;
  Build build_;
  std::shared_ptr<Exchange> built_;  // of a deferred exchange: what is moved for it
  struct Sync {
    std::mutex mutex;
    std::condition_variable ended;
  };
  HomeProcess home_;
  HomeOnly<Sync> sync_;
  bool in_flight_ = false;
  std::exception_ptr error_;
  int64_t start_ns_ = 0;
  int64_t end_ns_ = 0;
};

}  // namespace dear
