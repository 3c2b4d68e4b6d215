#pragma once

#include <ATen/ATen.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "collectives/lane.h"
#include "schedule/bucket.h"
#include "schedule/group_phase.h"
#include "schedule/home_stream.h"
#include "schedule/in_flight.h"
#include "schedule/profiled.h"
#include "schedule/trace.h"

namespace dear {

// What this library keeps for a bucket. The reduce-scatter reads DDP's buffer and writes `shard`; the
// all-gather completes `full`. With update="sharded", `full` holds the parameters and `shard` the gradient of
// this rank's chunk; with update="replicated", `full` is DDP's buffer again, with a version counter of its
// own, and `shard` this rank's chunk of it: averaged gradients come in the place of the local ones. `owners`
// says what the chunks are. Where several optimizers step on their own, each gathers its portion of `full`:
// one of `portions` says what it is, and who owns it.
struct BucketBuffers {
  at::Tensor shard;
  at::Tensor full;
  std::shared_ptr<Ownership> owners;                 // null: equal chunks
  std::vector<std::shared_ptr<Ownership>> portions;  // empty: one, of everything
};

// Parameters and what stands in their .grad.
using Placeholders = std::vector<std::pair<at::Tensor, at::Tensor>>;

// Decides when each half of each fusion group moves.
//
// Note [Local gradients stay whole]
// Where parameters are gathered, the reduce-scatter does not write into DDP's bucket. So .grad keeps the
// local gradient, and gradients accumulate as in plain DDP. A write to them that races with the reduction
// shows in the bucket's version counter, which no exchange touches.
//
// Threads: all calls come from the training thread, or from the autograd thread while the training thread
// waits in backward(); but any thread may wait. None takes or needs the GIL.
class Scheduler {
 public:
  // `gather_gradients`: the all-gather is of gradients, and follows the reduce-scatter without being asked
  // for.
  Scheduler(std::shared_ptr<Lane> reduce_lane, std::shared_ptr<Lane> gather_lane, bool gather_gradients);
  // Ends what is in flight first: the gather lane may be waiting for the other one.
  ~Scheduler() {
    if (!released_) {
      abort("The engine was dropped while an exchange was in flight: call engine.detach() first.");
    }
  }
  // Lets the lanes go, which another scheduler may use from now on. Waits for what is in flight.
  void release();

  // --- from DDP's hook ---

  // Takes a bucket that is ready to be reduced; `last` ends the backward pass. Buckets come in order of
  // `index`.
  void on_bucket(size_t index, Bucket bucket, bool last);
  // Called once when gradients have been delivered and DDP has finished with them; `layout_is_new` tells that
  // the buckets differ from those of adopt_layout() and nothing has been submitted.
  void set_backward_ended(std::function<void(bool layout_is_new, bool asked)> callback) {
    ended_ = std::move(callback);
  }
  // The callback is told that somebody has asked for the end of the next backward pass.
  void ask_for_backward_end() { asked_ = true; }
  // DDP waits for all ranks at the end of a backward pass, as where parameters may go unused, and would not
  // say who is missing: an exchange of ours comes first.
  void set_meets(bool meets) { meets_ = meets; }

  // --- layout; at a step boundary, or from the callback above ---

  const std::vector<Bucket>& incoming() const { return incoming_; }
  // Moves the incoming gradients into other buckets of the same parameters, which DDP will use from now on.
  void replace_incoming(std::vector<Bucket> buckets);
  // Adopts the incoming buckets, and reduces what was delivered in them. Waits for what is in flight.
  //   buffers       by bucket
  //   exchanges     by bucket, the compression groups in it; empty without a pipeline
  //   placeholders  become the .grad of their parameters after every backward pass: tensors that know that
  //                 they are not finished
  //   sizes, gather_order  as regroup() says
  void adopt_layout(std::vector<BucketBuffers> buffers, std::vector<TwoPhaseExchanges> exchanges,
                    Placeholders placeholders, const std::vector<size_t>& sizes,
                    std::vector<size_t> gather_order);
  // Others in the place of those of the layout, of the same memory; between two backward passes.
  void replace_placeholders(Placeholders placeholders) { placeholders_ = std::move(placeholders); }
  // Fusion groups of consecutive buckets, by the number of buckets in each; `gather_order` lists groups.
  // Waits for what is in flight.
  void regroup(const std::vector<size_t>& sizes, std::vector<size_t> gather_order);
  // Other buffers for the same buckets; regroup() must follow. Waits for what is in flight.
  void replace_buffers(std::vector<BucketBuffers> buffers);
  // The next backward pass brings a new layout, whatever its buckets. Waits for what is in flight.
  void forget_layout();

  // --- compression; needs `gather_gradients` ---

  // Gradients go through this pipeline from now on, which shares the gather lane.
  void set_pipeline(std::shared_ptr<Pipeline> pipeline);
  // Whether on any rank a gradient of the last backward pass was not finite. Waits until all ranks have said
  // so, which none can do before it has finished its backward pass; reads the device.
  bool any_dropped();

  // --- the step ---

  // Backward passes that have been reduced.
  int64_t passes() const { return passes_; }
  // Of a backward pass that has not delivered all of its buckets, the one that DDP waits for.
  std::optional<size_t> awaited_bucket() const { return awaited_; }
  // The last one has delivered gradients that no step has used.
  bool has_gradients() const { return has_gradients_; }
  // Nobody has written to gradients after the backward pass that sent them.
  bool untouched() const;
  void gradients_used() { has_gradients_ = false; }
  bool reduced(size_t group) { return groups_.at(group).reduce->done(); }
  void wait_reduced(size_t group);
  void submit_gather(size_t group, size_t portion);
  void wait_gathered(size_t group, size_t portion);
  bool gathering() const { return gathering_ > 0; }
  // Everything in flight has ended, and its failures are thrown.
  void synchronize();

  // --- looking on ---

  int64_t bytes_sent() const { return bytes_sent_ + (pipeline_ ? pipeline_->bytes_sent.load() : 0); }
  Timeline& timeline() { return timeline_; }
  // Makes both lanes fail with `reason`, so that no peer waits for us longer than it must.
  void abort(const std::string& reason);

 private:
  struct Gather {                       // of one portion
    std::unique_ptr<GroupPhase> phase;  // null where the group has nothing of it
    InFlight moving;
    std::vector<at::Tensor> params;  // those whose values change
  };
  struct Group {
    size_t first = 0;  // bucket
    size_t last = 0;   // one past
    std::unique_ptr<GroupPhase> reduce;
    std::vector<Gather> gathers;  // by portion
    TwoPhaseExchanges exchanges;  // where there is a compressor
    InFlight reducing;
    std::vector<uint32_t> versions;  // of the buckets' buffers when they were submitted
  };

  bool same_layout(size_t index, const Bucket& bucket) const;
  bool untouched(const Group& group) const;
  void meet(const at::Device& device);
  const std::shared_ptr<Lane>& lane_of(Phase phase, size_t group) const;
  void make_dense(Group& group);
  Gather make_gather(const Group& group, size_t portion, const std::string& label);
  void make_compressed(Group& group);
  void submit_all();
  void submit_reduce(size_t group);
  void submit_gathers_in_order();
  void finish_backward();
  template <typename Wait>
  void timed_wait(const GroupPhase& half, size_t group, int64_t WaitTimes::* total, Wait wait);
  void note_moved(const GroupPhase& half, size_t group);
  void note_lane(const std::string& lane, const std::string& name, int64_t start_ns, int64_t end_ns);
  void make_finiteness_check();
  void submit_dropped();

  std::shared_ptr<Lane> reduce_lane_;
  std::shared_ptr<Lane> gather_lane_;
  const bool gather_gradients_;
  std::function<void(bool, bool)> ended_;
  bool asked_ = false;
  bool meets_ = false;
  bool released_ = false;
  std::shared_ptr<Exchange> meeting_;

  std::vector<Bucket> incoming_;  // buckets that DDP has changed, until adopt_layout()
  std::vector<Bucket> buckets_;   // empty until the first layout
  std::vector<BucketBuffers> buffers_;
  Placeholders placeholders_;
  std::vector<Group> groups_;
  std::vector<size_t> group_of_bucket_;
  std::vector<size_t> gather_order_;
  bool layout_is_new_ = false;
  bool forgotten_ = false;  // the layout, until there is another one
  bool has_gradients_ = false;
  std::optional<size_t> awaited_;
  int64_t passes_ = 0;
  std::atomic<int> gathering_{0};
  std::mutex ending_;  // of what is on its way: see Note [Ctrl-C]

  std::shared_ptr<Pipeline> pipeline_;        // null: dense
  std::vector<TwoPhaseExchanges> exchanges_;  // by bucket
  at::Tensor dropped_;                        // int32 [ranks]: by each rank
  std::shared_ptr<Exchange> tell_dropped_;

  HomeStream home_;

  int64_t bytes_sent_ = 0;
  Timeline timeline_;
  ProfilerRows rows_;
};

}  // namespace dear
