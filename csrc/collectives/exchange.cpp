#include "collectives/exchange.h"

#include "collectives/clock.h"
#include "collectives/interrupt.h"

namespace dear {
namespace {

uint32_t mix(uint32_t hash, uint64_t value) {  // FNV-1a over eight bytes
  for (int shift = 0; shift < 64; shift += 8)
    hash = (hash ^ static_cast<uint8_t>(value >> shift)) * 16777619u;
  return hash;
}

}  // namespace

const char* phase_name(Phase phase) {
  switch (phase) {
    case Phase::kReduceScatter:
      return "reduce-scatter";
    case Phase::kAllGather:
      return "all-gather";
    case Phase::kAllToAll:
      return "all-to-all";
  }
  return "exchange";
}

bool is_uneven(const Part& part) { return part.owners && !part.owners->is_even(); }

std::shared_ptr<const Ownership> owners_of(const Part& part, int world) {
  return part.owners ? part.owners : Ownership::even(part.full.numel(), world);
}

void check_all_to_all(const Part& part, int world) {
  TORCH_CHECK(part.full.numel() % world == 0 && part.shard.numel() == part.full.numel(),
              "An all-to-all sends each rank a chunk of the same size.");
}

Exchange::Exchange(Phase phase, Reduction reduction, std::vector<Part> parts, std::string label, int world)
    : phase_(phase),
      reduction_(reduction),
      parts_(std::move(parts)),
      label_(std::move(label)),
      world_(world) {
  for (const Part& part : parts_) {
    TORCH_CHECK(part.full.dim() == 1 && part.full.is_contiguous(),
                "A collective needs flat contiguous tensors, and one of shape ", part.full.sizes(),
                " was given: pass tensor.contiguous().view(-1).");
    TORCH_CHECK(!part.full.is_complex(),
                "A collective over complex tensors is not supported: pass "
                "torch.view_as_real(tensor).view(-1).");
    TORCH_CHECK(part.full.layout() == at::kStrided,
                "A collective over sparse tensors is not supported: pass tensor.to_dense().view(-1).");
    TORCH_CHECK(!part.owners || part.owners->numel() == part.full.numel(), "The owners of a buffer of ",
                part.full.numel(), " elements must be told of as many.");
    if (phase_ != Phase::kAllGather) {
      TORCH_CHECK(part.shard.dim() == 1 && part.shard.is_contiguous() &&
                      part.shard.scalar_type() == part.full.scalar_type() &&
                      part.shard.device() == part.full.device(),
                  "The output of a ", phase_name(phase_),
                  " must be flat, contiguous, and of the input's dtype and device.");
    }
  }
}

void Exchange::begin() {
  home_.check("A collective");
  std::lock_guard<std::mutex> lock(sync_->mutex);
  TORCH_CHECK(!in_flight_, label_, " was submitted again while its ", phase_name(phase_),
              " was still in flight: wait for it first.");
  in_flight_ = true;
  error_ = nullptr;
}

void Exchange::started() { start_ns_ = now_ns(); }

void Exchange::finish() {
  end_ns_ = now_ns();
  // Notified under the lock: a waiter may destroy the exchange as soon as it is let go.
  std::lock_guard<std::mutex> lock(sync_->mutex);
  in_flight_ = false;
  sync_->ended.notify_all();
}

void Exchange::fail(std::exception_ptr error) {
  end_ns_ = now_ns();
  std::lock_guard<std::mutex> lock(sync_->mutex);
  error_ = std::move(error);
  in_flight_ = false;
  sync_->ended.notify_all();
}

void Exchange::wait() {
  home_.check("A collective");
  std::unique_lock<std::mutex> lock(sync_->mutex);
  wait_interruptibly(sync_->ended, lock, [this] { return !in_flight_; });
  if (error_) std::rethrow_exception(error_);
}

bool Exchange::done() {
  std::lock_guard<std::mutex> lock(sync_->mutex);
  return !in_flight_;
}

int64_t Exchange::bytes() const {
  int64_t total = 0;
  for (const Part& part : parts_) total += static_cast<int64_t>(part.full.nbytes());
  return total;
}

uint32_t Exchange::signature() const {
  uint32_t hash = 2166136261u;
  hash = mix(hash, static_cast<uint64_t>(phase_));
  hash = mix(hash, static_cast<uint64_t>(reduction_));
  for (const Part& part : parts_) {
    hash = mix(mix(hash, static_cast<uint64_t>(part.full.numel())),
               static_cast<uint64_t>(part.full.scalar_type()));
    for (int rank = 0; is_uneven(part) && rank < part.owners->world(); ++rank) {
      hash = mix(hash, static_cast<uint64_t>(part.owners->size(rank)));
      for (const Range& range : part.owners->ranges(rank))
        hash = mix(hash, static_cast<uint64_t>(range.begin));
    }
  }
  return hash;
}

}  // namespace dear
