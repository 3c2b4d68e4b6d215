#include "collectives/native.h"

#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <type_traits>
#include <utility>

namespace dear {
namespace {

// torch renamed these two between 2.11 and 2.13; either name is called where it exists.
template <typename Group, typename = void>
struct HasSingle : std::false_type {};
template <typename Group>
struct HasSingle<Group, std::void_t<decltype(&Group::reduce_scatter_single)>> : std::true_type {};

template <typename Group>
c10::intrusive_ptr<c10d::Work> call_reduce_scatter(Group& group, at::Tensor& out, at::Tensor& in,
                                                   const c10d::ReduceScatterOptions& options) {
  if constexpr (HasSingle<Group>::value) {
    return group.reduce_scatter_single(out, in, options);
  } else {
    return group._reduce_scatter_base(out, in, options);
  }
}

template <typename Group>
c10::intrusive_ptr<c10d::Work> call_all_gather(Group& group, at::Tensor& out, at::Tensor& in) {
  if constexpr (HasSingle<Group>::value) {
    return group.all_gather_single(out, in);
  } else {
    return group._allgather_base(out, in);
  }
}

c10::intrusive_ptr<c10d::Work> call_all_to_all(c10d::ProcessGroup& group, at::Tensor& out, at::Tensor& in) {
  std::vector<int64_t> equal;
  return group.alltoall_base(out, in, equal, equal);
}

// The backend wants equal chunks. A buffer that does not divide goes through padded staging buffers, made
// once.
class NativeExchange : public Exchange {
 public:
  NativeExchange(Phase phase, Reduction reduction, std::vector<Part> parts, std::string label, int rank,
                 int world)
      : Exchange(phase, reduction, std::move(parts), std::move(label)), rank_(rank), world_(world) {
    for (const Part& part : parts_) {
      const Shards shards{part.full.numel(), world};
      Buffers buffers;
      if (phase == Phase::kAllToAll) {
        check_all_to_all(part, world);
        buffers.full = part.full;
        buffers.shard = part.shard;
      } else if (shards.chunk() * world == shards.numel) {
        buffers.full = part.full;
        buffers.shard = phase == Phase::kReduceScatter ? part.shard : mine(part.full);
      } else {
        buffers.staged = true;
        buffers.full = at::zeros({shards.chunk() * world}, part.full.options());
        buffers.shard = buffers.full.narrow(0, shards.chunk() * rank, shards.chunk());
      }
      buffers_.push_back(buffers);
    }
  }

  void issue(c10d::ProcessGroup& group) {
    start_ns_ = now_ns();
    // Only NCCL averages; elsewhere the sum is divided when it has arrived.
    divides_ = phase_ == Phase::kReduceScatter && reduction_ == Reduction::kAverage;
    c10d::ReduceScatterOptions options;
    if (divides_ && group.getBackendName() == "nccl") {
      options.reduceOp = c10d::ReduceOp::AVG;
      divides_ = false;
    }
    for (size_t i = 0; i < parts_.size(); ++i) {
      Buffers& buffers = buffers_[i];
      if (parts_[i].full.numel() == 0) continue;
      if (phase_ == Phase::kAllToAll && world_ == 1) {
        buffers.shard.copy_(buffers.full);
      } else if (phase_ == Phase::kAllToAll) {
        works_.push_back(call_all_to_all(group, buffers.shard, buffers.full));
      } else if (phase_ == Phase::kReduceScatter) {
        if (buffers.staged) buffers.full.narrow(0, 0, parts_[i].full.numel()).copy_(parts_[i].full);
        works_.push_back(call_reduce_scatter(group, buffers.shard, buffers.full, options));
      } else {
        if (buffers.staged)
          mine(buffers.full.narrow(0, 0, parts_[i].full.numel())).copy_(mine(parts_[i].full));
        works_.push_back(call_all_gather(group, buffers.full, buffers.shard));
      }
    }
  }

  void wait() override {
    const std::lock_guard<std::mutex> alone(waiting_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (error_) std::rethrow_exception(error_);
      if (!in_flight_) return;
    }
    try {
      if (stand_in_) stand_in_->wait();
      for (const auto& work : works_) work->wait();
      for (size_t i = 0; i < parts_.size() && !stand_in_; ++i) settle(parts_[i], buffers_[i]);
    } catch (const std::exception& error) {
      works_.clear();
      fail(std::make_exception_ptr(std::runtime_error("The " + std::string(phase_name(phase_)) + " of " +
                                                      label_ + " failed on rank " + std::to_string(rank_) +
                                                      ": " + error.what())));
      std::rethrow_exception(error_);
    }
    works_.clear();
    finish();
  }

  bool done() override {
    const std::unique_lock<std::mutex> alone(waiting_, std::try_to_lock);
    if (!alone.owns_lock()) return false;  // somebody is waiting for it
    if (stand_in_) return stand_in_->done();
    for (const auto& work : works_) {
      if (!work->isCompleted()) return false;
    }
    return true;
  }

 private:
  struct Buffers {
    at::Tensor full;
    at::Tensor shard;
    bool staged = false;
  };

  at::Tensor mine(const at::Tensor& full) const {
    const Shards shards{full.numel(), world_};
    return full.narrow(0, shards.begin(rank_), shards.size(rank_));
  }

  void settle(const Part& part, Buffers& buffers) {
    if (phase_ == Phase::kAllToAll) return;
    if (phase_ == Phase::kAllGather) {
      if (buffers.staged) part.full.copy_(buffers.full.narrow(0, 0, part.full.numel()));
      return;
    }
    if (buffers.staged) part.shard.copy_(buffers.shard.narrow(0, 0, part.shard.numel()));
    if (!divides_) return;
    at::Tensor shard = part.shard;
    if (at::isIntegralType(shard.scalar_type(), true)) {
      shard.div_(world_, "trunc");
    } else {
      shard.div_(world_);
    }
  }

  const int rank_;
  const int world_;
  std::mutex waiting_;
  bool divides_ = false;
  std::vector<Buffers> buffers_;
  std::vector<c10::intrusive_ptr<c10d::Work>> works_;
};

}  // namespace

NativeLane::NativeLane(c10::intrusive_ptr<c10d::ProcessGroup> group) : group_(std::move(group)) {}

std::shared_ptr<Exchange> NativeLane::make_exchange(Phase phase, Reduction reduction, std::vector<Part> parts,
                                                    std::string label) {
  return std::make_shared<NativeExchange>(phase, reduction, std::move(parts), std::move(label), rank(),
                                          world());
}

void NativeLane::submit(const std::shared_ptr<Exchange>& exchange) {
  exchange->begin();
  try {
    TORCH_CHECK(abort_reason_.empty(), abort_reason_);
    Exchange& moved = exchange->take_turn();
    if (&moved != exchange.get()) moved.begin();
    static_cast<NativeExchange&>(moved).issue(*group_);
  } catch (const std::exception& error) {
    exchange->fail(std::make_exception_ptr(std::runtime_error(error.what())));
  }
}

void NativeLane::abort(const std::string& reason) {
  if (abort_reason_.empty()) abort_reason_ = reason;
}

}  // namespace dear
