#include "collectives/native.h"

#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "collectives/accumulate.h"
#include "collectives/backend_calls.h"
#include "collectives/backend_wait.h"
#include "collectives/clock.h"
#include "collectives/shard.h"
#include "collectives/staging.h"
#include "collectives/submitter.h"

namespace dear {
namespace {

using Tensors = std::vector<at::Tensor>;

constexpr double kMostPadding = 0.02;  // of what an exchange moves; see Note [Staging]

// The backend's reduce-scatter and all-gather want equal chunks. A buffer that does not divide goes through
// padded staging buffers, made once. One with owners is a staging buffer already (see Staging), and goes by a
// reduce to each owner, or a broadcast from each.
class NativeExchange : public Exchange {
 public:
  NativeExchange(Phase phase, Reduction reduction, std::vector<Part> parts, std::string label, int rank,
                 int world)
      : Exchange(phase, reduction, std::move(parts), std::move(label), world), rank_(rank) {
    for (const Part& part : parts_) {
      const Shards shards{part.full.numel(), world};
      Buffers buffers;
      if (phase == Phase::kAllToAll) {
        check_all_to_all(part, world);
        buffers.full = part.full;
        buffers.shard = part.shard;
      } else if (is_uneven(part)) {
        buffers.full = part.full;
        buffers.chunks = chunks_of(part);
      } else if (shards.chunk() * world == shards.numel && !prescales(part.full)) {
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
    submitter_.remember();
    pack();
    if (parts_.empty()) return;
    // A group may have several backends, one for each type of device.
    const c10::Device device = parts_.front().full.device();
    on_host_ = device.is_cpu();
    nccl_ = device.is_cuda() && group.getBackend(device.type())->getBackendName() == "nccl";
    Tensors out;
    Tensors in;
    std::vector<OwnedChunk> chunks;
    for (size_t i = 0; i < parts_.size(); ++i) {
      const Part& part = parts_[i];
      Buffers& buffers = buffers_[i];
      if (part.full.numel() == 0) continue;
      if (phase_ == Phase::kAllToAll && world_ == 1) {
        buffers.shard.copy_(buffers.full);
        continue;
      }
      if (!buffers.chunks.empty()) {
        if (prescales(part.full)) buffers.full.mul_(rule(part.full).own_scale);
        for (OwnedChunk each : buffers.chunks) {
          each.op = operation(each.chunk);
          chunks.push_back(std::move(each));
        }
        continue;
      }
      if (buffers.staged) stage(part, buffers);
      const bool gathers = phase_ == Phase::kAllGather;
      in.push_back(gathers ? buffers.shard : buffers.full);
      out.push_back(gathers ? buffers.full : buffers.shard);
    }
    send_equal(group, out, in);
    send_owned(group, chunks);
  }

  // By a ring: what an owner is to get passes through all others, and what it sends ends at the rank before
  // it.
  int64_t bytes_sent() const override {
    int64_t even = 0;
    int64_t owned = 0;
    for (const Part& part : parts_) {
      if (!is_uneven(part)) {
        even += static_cast<int64_t>(part.full.nbytes());
        continue;
      }
      const int spared = phase_ == Phase::kReduceScatter ? rank_ : (rank_ + 1) % world_;
      owned += (part.owners->owned() - part.owners->size(spared)) * part.full.element_size();
    }
    return even * (world_ - 1) / world_ + owned;
  }

  void wait() override {
    home_.check("A collective");
    const std::lock_guard<std::recursive_mutex> alone(waiting_);
    if (has_ended()) return follow();
    NativeExchange& moved = built_ ? static_cast<NativeExchange&>(*built_) : *this;
    moved.await_backend();             // what it throws is Ctrl-C, and no failure: one may wait again
    if (has_ended()) return follow();  // see Note [Ctrl-C]
    try {
      if (built_) built_->wait();
      if (backend_) {
        backend_->rethrow();
      } else {
        for (const auto& work : works_) work->wait();
      }
      submitter_.run([this] {
        for (size_t i = 0; i < parts_.size() && !built_; ++i) settle(parts_[i], buffers_[i]);
        if (!built_) unpack();
      });
      note_settled();
    } catch (const std::exception& error) {
      forget();
      fail(std::make_exception_ptr(std::runtime_error("The " + std::string(phase_name(phase_)) + " of " +
                                                      label_ + " failed on rank " + std::to_string(rank_) +
                                                      ": " + error.what())));
      std::rethrow_exception(error_);
    }
    forget();
    finish();
  }

  bool done() override {
    const std::unique_lock<std::recursive_mutex> alone(waiting_, std::try_to_lock);
    if (!alone.owns_lock()) return false;  // somebody is waiting for it
    if (built_) return built_->done();
    if (on_host_ && !works_.empty()) return backend().ended();
    for (const auto& work : works_) {
      if (!work->isCompleted()) return false;
    }
    return true;
  }

 protected:
  // Before the backend is called, and when its result stands.
  virtual void pack() {}
  virtual void unpack() {}

 private:
  struct Buffers {
    at::Tensor full;
    at::Tensor shard;
    bool staged = false;
    std::vector<OwnedChunk> chunks = {};  // where they have owners
  };

  // Rethrows its failure.
  bool has_ended() {
    std::lock_guard<std::mutex> lock(sync_->mutex);
    if (error_) std::rethrow_exception(error_);
    return !in_flight_;
  }

  BackendWait& backend() {
    if (!backend_) backend_.emplace(works_);
    return *backend_;
  }

  // Of host tensors: until they have been moved, or cannot be.
  void await_backend() {
    if (on_host_ && !works_.empty()) backend().await_end();
  }

  void forget() {
    works_.clear();
    backend_.reset();
  }

  void stage(const Part& part, Buffers& buffers) {
    const at::Tensor inside = buffers.full.narrow(0, 0, part.full.numel());
    if (phase_ == Phase::kReduceScatter) {
      inside.copy_(part.full);
      if (prescales(part.full)) inside.mul_(rule(part.full).own_scale);
    } else {
      mine(inside).copy_(mine(part.full));
    }
  }

  static std::vector<OwnedChunk> chunks_of(const Part& part) {
    std::vector<OwnedChunk> chunks;
    for (int owner = 0; owner < part.owners->world(); ++owner) {
      for (const Range& range : part.owners->ranges(owner))
        chunks.push_back({part.full.narrow(0, range.begin, range.size()), owner});
    }
    return chunks;
  }

  void send_equal(c10d::ProcessGroup& group, Tensors& out, Tensors& in) {
    if (in.empty()) return;
    // NCCL makes one operation of many: one launch, and no pause between them.
    const bool together = phase_ != Phase::kAllToAll && nccl_ &&
                          std::all_of(in.begin(), in.end(), [&](const at::Tensor& tensor) {
                            return tensor.scalar_type() == in[0].scalar_type();
                          });
    if (together) {
      send(group, out, in);
      return;
    }
    for (size_t i = 0; i < in.size(); ++i) {
      Tensors one_out{out[i]};
      Tensors one_in{in[i]};
      send(group, one_out, one_in);
    }
  }

  void send_owned(c10d::ProcessGroup& group, std::vector<OwnedChunk>& chunks) {
    if (chunks.empty()) return;
    const auto works =
        phase_ == Phase::kAllGather ? call_broadcasts(group, chunks) : call_reduces(group, chunks);
    works_.insert(works_.end(), works.begin(), works.end());
  }

  // Tensors of one type; of several only with NCCL.
  void send(c10d::ProcessGroup& group, Tensors& out, Tensors& in) {
    if (phase_ == Phase::kAllToAll) {
      works_.push_back(call_all_to_all(group, out[0], in[0]));
    } else if (phase_ == Phase::kAllGather) {
      works_.push_back(call_all_gather(group, out, in));
    } else {
      works_.push_back(call_reduce_scatter(group, out, in, operation(in[0])));
    }
  }

  c10d::ReduceOp::RedOpType operation(const at::Tensor& tensor) const {
    return averages_itself(tensor) ? c10d::ReduceOp::AVG : c10d::ReduceOp::SUM;
  }

  // The sum is divided when it has arrived, by every backend alike. NCCL could average, but it scales what
  // each rank gives, which rounds once more, and does not do so by PAT, its algorithm for many hosts of one
  // GPU each. Float16 needs it: its sum may overflow.
  bool averages_itself(const at::Tensor& tensor) const {
    return nccl_ && reduction_ == Reduction::kAverage && tensor.scalar_type() == at::kHalf;
  }

  // On the host, values are scaled before they are summed; see Note [Averages without overflow].
  bool prescales(const at::Tensor& tensor) const {
    return phase_ == Phase::kReduceScatter && reduction_ == Reduction::kAverage && tensor.is_cpu() &&
           at::isFloatingType(tensor.scalar_type()) && world_ > 1;
  }

  // How what has been scaled is summed, the division included.
  AddRule rule(const at::Tensor& tensor) const {
    return average_rule(tensor.scalar_type(), world_, true, true);
  }

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
    if (reduction_ != Reduction::kAverage || averages_itself(part.full)) return;
    at::Tensor shard = part.shard;
    if (at::isIntegralType(shard.scalar_type(), true)) {
      shard.div_(world_, "trunc");
    } else if (prescales(part.full)) {
      const float divisor = rule(part.full).divisor;
      if (divisor != 1) shard.div_(divisor);
    } else {
      shard.div_(world_);
    }
  }

  // The first to wait orders its stream behind the backend's, and settles there. Whoever waits later, on
  // whatever stream, is ordered behind that.
  void note_settled() {
    const c10::Device device = parts_.empty() ? c10::Device(c10::kCPU) : parts_.front().full.device();
    if (device.is_cpu()) return;
    const c10::impl::VirtualGuardImpl guard(device.type());
    if (!settled_) settled_.emplace(device.type());
    settled_->record(guard.getStream(device));
  }

  void follow() {
    if (built_) return built_->wait();
    if (!settled_) return;
    const c10::impl::VirtualGuardImpl guard(settled_->device_type());
    settled_->block(guard.getStream(parts_.front().full.device()));
  }

  const int rank_;
  std::recursive_mutex waiting_;
  std::optional<c10::Event> settled_;
  bool nccl_ = false;
  bool on_host_ = false;
  Submitter submitter_;
  std::vector<Buffers> buffers_;
  std::vector<BackendWork> works_;
  std::optional<BackendWait> backend_;  // of host tensors, once somebody has waited or asked
};

// Of buffers whose chunks are not equal. See Note [Staging].
class StagedExchange : public NativeExchange {
 public:
  StagedExchange(Phase phase, Reduction reduction, Staging staging, std::string label, int rank, int world)
      : NativeExchange(phase, reduction, staging.parts(), std::move(label), rank, world),
        staging_(std::move(staging)) {}

 protected:
  void pack() override { staging_.pack(); }
  void unpack() override { staging_.unpack(); }

 private:
  Staging staging_;
};

}  // namespace

NativeLane::NativeLane(c10::intrusive_ptr<c10d::ProcessGroup> group) : group_(std::move(group)) {}

std::shared_ptr<Exchange> NativeLane::make_exchange(Phase phase, Reduction reduction, std::vector<Part> parts,
                                                    std::string label) {
  if (std::any_of(parts.begin(), parts.end(), is_uneven)) {
    const Chunks layout = chunks_of(phase, parts);
    Staging staging(std::move(parts), phase, rank(), world(), std::numeric_limits<int64_t>::max(), layout);
    return std::make_shared<StagedExchange>(phase, reduction, std::move(staging), std::move(label), rank(),
                                            world());
  }
  return std::make_shared<NativeExchange>(phase, reduction, std::move(parts), std::move(label), rank(),
                                          world());
}

// Padded or grouped, whichever is fewer bytes; see Note [Staging].
Chunks NativeLane::chunks_of(Phase phase, const std::vector<Part>& parts) const {
  if (padding_share(parts, world()) > kMostPadding) return Chunks::kAligned;
  const c10::DeviceType device = parts.front().full.device().type();
  const bool doubles =
      phase == Phase::kReduceScatter && world() > 1 && group_->getBackend(device)->getBackendName() == "gloo";
  return doubles ? Chunks::kAligned : Chunks::kPadded;
}

void NativeLane::submit(const std::shared_ptr<Exchange>& exchange) {
  exchange->begin();
  try {
    TORCH_CHECK(abort_reason_.empty(), abort_reason_);
    Exchange& moved = exchange->built();
    if (&moved != exchange.get()) moved.begin();
    static_cast<NativeExchange&>(moved).issue(*group_);
  } catch (...) {  // whoever waits for it hears of it, also of Ctrl-C
    exchange->fail(std::current_exception());
  }
}

void NativeLane::abort(const std::string& reason) {
  if (abort_reason_.empty()) abort_reason_ = reason;
}

}  // namespace dear
