#include "schedule/scheduler.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/engine.h>

#include <algorithm>
#include <unordered_map>

#include "collectives/clock.h"
#include "collectives/native.h"

namespace dear {
namespace {

constexpr int64_t kShownWait = 50'000;  // ns; a trace leaves shorter waits out

constexpr char kGroup[] = "fusion group ";

std::string group_label(size_t index) { return kGroup + std::to_string(index); }

}  // namespace

Scheduler::Scheduler(std::shared_ptr<Lane> reduce_lane, std::shared_ptr<Lane> gather_lane,
                     bool gather_gradients)
    : reduce_lane_(std::move(reduce_lane)),
      gather_lane_(std::move(gather_lane)),
      gather_gradients_(gather_gradients) {}

void Scheduler::release() {
  synchronize();
  released_ = true;
  if (pipeline_) pipeline_->release();
}

bool Scheduler::same_layout(size_t index, const Bucket& bucket) const {
  return !groups_.empty() && index < buckets_.size() &&
         buckets_[index].buffer.unsafeGetTensorImpl() == bucket.buffer.unsafeGetTensorImpl();
}

void Scheduler::on_bucket(size_t index, Bucket bucket, bool last) {
  const at::Device device = bucket.buffer.device();
  if (index == 0) {
    synchronize();
    layout_is_new_ = !same_layout(0, bucket);
    has_gradients_ = true;
    if (pipeline_) {
      pipeline_->begin_step();
      dropped_.zero_();
    }
  }
  if (!layout_is_new_) {
    // DDP rebuilds all of its buckets or none, so the first one has told.
    TORCH_CHECK(same_layout(index, bucket), "DDP changed bucket ", index,
                " in the middle of a backward pass.");
    const size_t group = group_of_bucket_[index];
    if (index + 1 == groups_[group].last) submit_reduce(group);
  } else {
    if (index == 0) incoming_.clear();
    incoming_.push_back(std::move(bucket));
  }
  awaited_ = last ? std::nullopt : std::optional(index + 1);
  if (last) {
    ++passes_;
    if (meets_) meet(device);
    if (!layout_is_new_ && gather_gradients_) submit_gathers_in_order();
    // Queued twice over, to come after the callback in which DDP finishes its own work.
    auto& engine = torch::autograd::Engine::get_default_engine();
    engine.queue_callback([this, &engine] { engine.queue_callback([this] { finish_backward(); }); });
  }
}

void Scheduler::meet(const at::Device& device) {
  if (!meeting_) {
    const auto options = at::TensorOptions().device(device).dtype(at::kInt);
    const at::Tensor ranks = at::zeros({gather_lane_->world()}, options);
    meeting_ = gather_lane_->make_exchange(Phase::kAllGather, Reduction::kSum,
                                           {{ranks, ranks.narrow(0, gather_lane_->rank(), 1)}},
                                           "the ranks that come to the end of the backward pass");
  }
  gather_lane_->submit(meeting_);
  meeting_->wait();
}

void Scheduler::finish_backward() {
  home_.note(buckets_.empty() ? incoming_ : buckets_);  // backward() has its caller's streams current again
  if (ended_) ended_(layout_is_new_, std::exchange(asked_, false));
  layout_is_new_ = false;
  for (auto& [param, placeholder] : placeholders_) {
    placeholder.unsafeGetTensorImpl()->set_python_dispatch(true);  // off where it was zeroed or added to
    param.mutable_grad() = placeholder;
  }
}

void Scheduler::replace_incoming(std::vector<Bucket> buckets) {
  std::unordered_map<const c10::TensorImpl*, at::Tensor> grads;
  for (const Bucket& bucket : incoming_) {
    for (size_t i = 0; i < bucket.params.size(); ++i) {
      grads.emplace(bucket.params[i].unsafeGetTensorImpl(), bucket.grads[i]);
    }
  }
  for (Bucket& bucket : buckets) {
    for (size_t i = 0; i < bucket.params.size(); ++i) {
      const auto found = grads.find(bucket.params[i].unsafeGetTensorImpl());
      TORCH_CHECK(found != grads.end(), "DDP's new buckets hold a parameter that the old ones did not.");
      bucket.grads[i].copy_(found->second);
    }
  }
  for (const Bucket& bucket : incoming_) {  // DDP has let go of these: read on this stream, freed on another
    if (bucket.buffer.is_cpu()) break;
    const c10::impl::VirtualGuardImpl guard(bucket.buffer.device().type());
    guard.recordDataPtrOnStream(bucket.buffer.storage().data_ptr(), guard.getStream(bucket.buffer.device()));
  }
  incoming_ = std::move(buckets);
}

void Scheduler::adopt_layout(std::vector<BucketBuffers> buffers, std::vector<TwoPhaseExchanges> exchanges,
                             Placeholders placeholders, const std::vector<size_t>& sizes,
                             std::vector<size_t> gather_order) {
  TORCH_CHECK(buffers.size() == incoming_.size(), "A layout needs one pair of buffers for each bucket.");
  TORCH_CHECK(exchanges.size() == (pipeline_ ? incoming_.size() : 0),
              "A layout needs the compression groups of each bucket, and only with a compressor.");
  synchronize();
  groups_.clear();
  buckets_ = std::exchange(incoming_, {});
  buffers_ = std::move(buffers);
  exchanges_ = std::move(exchanges);
  placeholders_ = std::move(placeholders);
  forgotten_ = false;
  regroup(sizes, std::move(gather_order));
  submit_all();
}

void Scheduler::regroup(const std::vector<size_t>& sizes, std::vector<size_t> gather_order) {
  synchronize();
  if (forgotten_) return;  // its exchanges are of what is no more; the next layout brings others
  groups_.clear();
  group_of_bucket_.clear();
  for (const size_t size : sizes) {
    Group group;
    group.first = group_of_bucket_.size();
    group.last = group.first + size;
    TORCH_CHECK(size > 0 && group.last <= buffers_.size(), "Fusion groups must cover the buckets exactly.");
    pipeline_ ? make_compressed(group) : make_dense(group);
    group_of_bucket_.resize(group.last, groups_.size());
    groups_.push_back(std::move(group));
  }
  TORCH_CHECK(group_of_bucket_.size() == buffers_.size() && gather_order.size() == groups_.size(),
              "Fusion groups must cover the buckets exactly.");
  gather_order_ = std::move(gather_order);
  if (pipeline_) make_finiteness_check();
}

void Scheduler::replace_buffers(std::vector<BucketBuffers> buffers) {
  TORCH_CHECK(buffers.size() == buffers_.size(), "A layout needs one pair of buffers for each bucket.");
  synchronize();
  groups_.clear();
  buffers_ = std::move(buffers);
}

void Scheduler::forget_layout() {
  synchronize();
  groups_.clear();
  gather_order_.clear();
  forgotten_ = true;
}

void Scheduler::make_dense(Group& group) {
  std::vector<Part> to_reduce;
  for (size_t i = group.first; i < group.last; ++i)
    to_reduce.push_back({buckets_[i].buffer.view(-1), buffers_[i].shard, buffers_[i].owners});
  const std::string label = group_label(groups_.size());
  const auto& lane = lane_of(Phase::kReduceScatter, groups_.size());
  const auto reduce =
      lane->make_exchange(Phase::kReduceScatter, Reduction::kAverage, std::move(to_reduce), label);
  group.reduce = std::make_unique<DensePhase>(lane, reduce);
  const size_t portions = std::max<size_t>(1, buffers_[group.first].portions.size());
  for (size_t portion = 0; portion < portions; ++portion)
    group.gathers.push_back(make_gather(group, portion, label));
  if (!gather_gradients_) return;
  for (const Gather& gather : group.gathers) {
    static_cast<DensePhase&>(*gather.phase).exchange().defer([reduce]() -> std::shared_ptr<Exchange> {
      reduce->wait();
      return nullptr;
    });
  }
}

Scheduler::Gather Scheduler::make_gather(const Group& group, size_t portion, const std::string& label) {
  Gather gather;
  std::vector<Part> parts;
  for (size_t i = group.first; i < group.last; ++i) {
    const auto& portions = buffers_[i].portions;
    const bool whole = portions.empty();
    const auto& owners = whole ? buffers_[i].owners : portions.at(portion);
    if (!whole && owners->owned() == 0) continue;
    parts.push_back({buffers_[i].full, buffers_[i].shard, owners});
    const Bucket& bucket = buckets_[i];
    for (size_t j = 0; j < bucket.params.size(); ++j) {
      const int64_t start = bucket.grads[j].storage_offset() - bucket.buffer.storage_offset();
      if (whole || owners->owns(start)) gather.params.push_back(bucket.params[j]);
    }
  }
  if (parts.empty()) return gather;
  const auto& lane = lane_of(Phase::kAllGather, groups_.size());
  gather.phase = std::make_unique<DensePhase>(
      lane, lane->make_exchange(Phase::kAllGather, Reduction::kSum, std::move(parts), label));
  return gather;
}

// Note [Lanes take turns]
// NCCL needs about a millisecond over sockets to begin a collective and to end it, in which the link idles:
// over 10 Gbit/s, a tenth of a fusion group's time. The two lanes are hardly ever busy at the same time
// (all-gathers begin where the reduce-scatters end). So on a GPU every second group moves each half on the
// other half's lane: one group begins while the one before it ends. Not where ranks meet at the end of the
// backward pass: the training stream would wait there for the reduce-scatters on that lane.
const std::shared_ptr<Lane>& Scheduler::lane_of(Phase phase, size_t group) const {
  const bool takes_turns = !meets_ && !buckets_.front().buffer.is_cpu() &&
                           dynamic_cast<NativeLane*>(reduce_lane_.get()) &&
                           dynamic_cast<NativeLane*>(gather_lane_.get());
  const bool other = takes_turns && group % 2 == 1;
  return (phase == Phase::kReduceScatter) != other ? reduce_lane_ : gather_lane_;
}

void Scheduler::make_compressed(Group& group) {
  TwoPhaseExchanges exchanges;
  for (size_t i = group.first; i < group.last; ++i) {
    exchanges.insert(exchanges.end(), exchanges_.at(i).begin(), exchanges_.at(i).end());
  }
  group.reduce = std::make_unique<FirstPhase>(exchanges);
  group.gathers.emplace_back();
  group.gathers.back().phase = std::make_unique<SecondPhase>(exchanges);
  group.exchanges = std::move(exchanges);
}

void Scheduler::set_pipeline(std::shared_ptr<Pipeline> pipeline) {
  TORCH_CHECK(gather_gradients_, "Compressed gradients are gathered, not the parameters.");
  pipeline_ = std::move(pipeline);
  const auto options = at::TensorOptions().device(pipeline_->device()).dtype(at::kInt);
  dropped_ = at::zeros({gather_lane_->world()}, options);
}

void Scheduler::make_finiteness_check() {
  const at::Tensor own = dropped_.narrow(0, gather_lane_->rank(), 1);
  const std::string last = std::to_string(groups_.size() - 1);
  const std::string label = "the finiteness check of " + group_label(0) + (last == "0" ? "" : " to " + last);
  tell_dropped_ = gather_lane_->make_exchange(Phase::kAllGather, Reduction::kSum, {{dropped_, own}}, label);
}

void Scheduler::submit_dropped() {
  at::Tensor own = dropped_.narrow(0, gather_lane_->rank(), 1);
  for (const Group& group : groups_) {
    for (const auto& exchange : group.exchanges) own.add_(exchange->dropped());
  }
  gather_lane_->submit(tell_dropped_);
}

bool Scheduler::any_dropped() {
  if (!tell_dropped_) return false;
  const ProfiledSpan span("wait, finiteness check");
  const int64_t start = now_ns();
  tell_dropped_->wait();
  const int64_t end = now_ns();
  timeline_.waited(&WaitTimes::all_gather_ns, end - start);
  if (end - start > kShownWait) timeline_.note("wait", "finiteness check", start, end);
  return dropped_.ne(0).any().item<bool>();
}

void Scheduler::submit_all() {
  for (size_t group = 0; group < groups_.size(); ++group) submit_reduce(group);
  if (gather_gradients_) submit_gathers_in_order();
}

void Scheduler::submit_reduce(size_t index) {
  const ProfiledSpan span("submit, reduce-scatter of ", kGroup, index);
  Group& group = groups_[index];
  group.versions.clear();
  for (size_t i = group.first; i < group.last; ++i) group.versions.push_back(buckets_[i].buffer._version());
  bytes_sent_ += group.reduce->bytes_sent();
  group.reduce->start();
  group.reducing.begin();  // now, since what has not started has nothing to wait for
}

void Scheduler::submit_gathers_in_order() {
  if (pipeline_) submit_dropped();
  for (const size_t group : gather_order_) submit_gather(group, 0);
  for (const size_t group : gather_order_) {
    if (const auto& phase = groups_[group].gathers[0].phase) phase->follow_up();
  }
}

void Scheduler::submit_gather(size_t index, size_t portion) {
  Gather& gather = groups_.at(index).gathers.at(portion);
  if (!gather.phase) return;
  if (gather.moving.turn() != 0) wait_gathered(index, portion);
  const ProfiledSpan span("submit, all-gather of ", kGroup, index);
  bytes_sent_ += gather.phase->bytes_sent();
  if (!gather_gradients_) home_.note(buckets_);  // the optimizer's step
  gather.phase->start();
  ++gathering_;
  gather.moving.begin();
}

template <typename Wait>
void Scheduler::timed_wait(const GroupPhase& half, size_t group, int64_t WaitTimes::* total, Wait wait) {
  const int64_t start = now_ns();
  {
    const ProfiledSpan span("wait, ", phase_name(half.phase()), " of ", kGroup, group);
    home_.wait_with(wait);
  }
  const int64_t end = now_ns();
  timeline_.waited(total, end - start);
  if (timeline_.tracing() && end - start > kShownWait) {
    timeline_.note("wait", std::string(phase_name(half.phase())) + " of " + group_label(group), start, end);
  }
}

// Of what has ended, by the one waiter that ends it: the next one may begin at once behind it.
void Scheduler::note_moved(const GroupPhase& half, size_t group) {
  if (!timeline_.tracing() && !profiled()) return;
  const std::string name = group_label(group);
  note_lane(phase_name(half.phase()), name, half.start_ns(), half.end_ns());
  const auto [from, until] = half.decoding();
  if (from > 0) note_lane("decode", name, from, until);
}

void Scheduler::note_lane(const std::string& lane, const std::string& name, int64_t start_ns,
                          int64_t end_ns) {
  timeline_.note(lane, name, start_ns, end_ns);
  // Of device tensors the profiler shows what the device did.
  if (profiled() && buckets_.front().buffer.is_cpu()) rows_.report(lane, name, start_ns, end_ns);
}

void Scheduler::wait_reduced(size_t index) {
  Group& group = groups_.at(index);
  const int64_t turn = group.reducing.turn();
  if (turn == 0) return;
  timed_wait(*group.reduce, index, &WaitTimes::reduce_scatter_ns, [&] { group.reduce->wait(); });
  bool clean = true;
  group.reducing.end(turn, ending_, [&] {
    note_moved(*group.reduce, index);
    clean = untouched(group);
  });
  TORCH_CHECK(
      clean, "Gradients of fusion group ", index,
      " were written to by a backward pass that DDP does not reduce, while it reduced them: sum the losses "
      "and call backward() once, or give each backward pass a forward pass of its own.");
}

bool Scheduler::untouched(const Group& group) const {
  for (size_t i = 0; i < group.versions.size(); ++i) {
    if (buckets_[group.first + i].buffer._version() != group.versions[i]) return false;
  }
  return true;
}

bool Scheduler::untouched() const {
  return std::all_of(groups_.begin(), groups_.end(), [this](const Group& group) { return untouched(group); });
}

void Scheduler::wait_gathered(size_t index, size_t portion) {
  if (groups_.empty()) return;  // the layout was forgotten, after everything had ended
  Gather& gather = groups_.at(index).gathers.at(portion);
  const int64_t turn = gather.moving.turn();
  if (turn == 0) return;
  if (gather_gradients_) wait_reduced(index);
  timed_wait(*gather.phase, index, &WaitTimes::all_gather_ns, [&] { gather.phase->wait(); });
  gather.moving.end(turn, ending_, [&] {
    note_moved(*gather.phase, index);
    --gathering_;
    if (gather_gradients_) return;
    // Parameters changed under autograd's eyes: whoever saved one of them too early is told so in backward().
    for (const at::Tensor& param : gather.params) param.unsafeGetTensorImpl()->bump_version();
  });
}

void Scheduler::synchronize() {
  for (size_t group = 0; group < groups_.size(); ++group) wait_reduced(group);
  if (groups_.empty()) return;
  for (const size_t group : gather_order_) {
    for (size_t portion = 0; portion < groups_.at(group).gathers.size(); ++portion)
      wait_gathered(group, portion);
  }
}

void Scheduler::abort(const std::string& reason) {
  reduce_lane_->abort(reason);
  gather_lane_->abort(reason);
  if (pipeline_) pipeline_->abort(reason);
}

}  // namespace dear
