#include "collectives/two_level.h"

#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

namespace dear {
namespace {

using Counter = std::shared_ptr<std::atomic<int64_t>>;

// One level of an exchange: which lane moves it, and who counts what is sent.
struct Level {
  std::shared_ptr<Lane> lane;
  Counter sent;
};

// Of a buffer: the ranges that each place of the node must come to own, or each node at this rank's place.
std::shared_ptr<const Ownership> by_place(const Ownership& owners, const Nodes& nodes) {
  std::vector<std::vector<Range>> ranges(nodes.front().size());
  for (const auto& node : nodes) {
    for (size_t place = 0; place < node.size(); ++place) {
      const auto& own = owners.ranges(node[place]);
      ranges[place].insert(ranges[place].end(), own.begin(), own.end());
    }
  }
  return std::make_shared<Ownership>(owners.numel(), std::move(ranges));
}

std::shared_ptr<const Ownership> by_node(const Ownership& owners, const Nodes& nodes, int place) {
  std::vector<std::vector<Range>> ranges;
  for (const auto& node : nodes) ranges.push_back(owners.ranges(node.at(static_cast<size_t>(place))));
  return std::make_shared<Ownership>(owners.numel(), std::move(ranges));
}

// The same of a buffer that holds what this place owns, node by node.
std::shared_ptr<const Ownership> packed_by_node(const Ownership& owners, const Nodes& nodes, int place) {
  std::vector<std::vector<Range>> ranges;
  int64_t begin = 0;
  for (const auto& node : nodes) {
    const int64_t size = owners.size(node.at(static_cast<size_t>(place)));
    ranges.emplace_back();
    if (size > 0) ranges.back().push_back({begin, begin + size});
    begin += size;
  }
  return std::make_shared<Ownership>(begin, std::move(ranges));
}

class TwoLevelExchange : public Exchange {
 public:
  TwoLevelExchange(Phase phase, Reduction reduction, std::vector<Part> parts, std::string label, Level inside,
                   Level between, const Nodes& nodes)
      : Exchange(phase, reduction, std::move(parts), std::move(label),
                 inside.lane->world() * between.lane->world()),
        first_(phase == Phase::kReduceScatter ? inside : between),
        second_(phase == Phase::kReduceScatter ? between : inside) {
    std::vector<Part> first;
    std::vector<Part> second;
    const int place = inside.lane->rank();
    for (const Part& part : parts_) {
      const auto owners = owners_of(part, static_cast<int>(nodes.size() * nodes.front().size()));
      const at::Tensor none = part.full.narrow(0, 0, 0);
      const auto of_places = by_place(*owners, nodes);
      if (phase == Phase::kReduceScatter) {
        const at::Tensor sums = at::empty({of_places->size(place)}, part.full.options());
        first.push_back({part.full, sums, of_places});
        second.push_back({sums, part.shard, packed_by_node(*owners, nodes, place)});
      } else {
        first.push_back({part.full, none, by_node(*owners, nodes, place)});
        second.push_back({part.full, none, of_places});
      }
    }
    if (!parts_.empty()) {
      moves_first_ = first_.lane->make_exchange(phase, reduction, std::move(first), label_);
      moves_second_ = second_.lane->make_exchange(phase, reduction, std::move(second), label_);
    }
    queue_first_ = first_.lane->make_exchange(phase, reduction, {}, label_);
    queue_first_->defer([this] {
      now_ = static_cast<TwoLevelExchange*>(&built());
      TORCH_CHECK(now_->phase() == phase_ && now_->moves_first_, "A deferred ", phase_name(phase_),
                  " has become another exchange, which two levels cannot move.");
      *first_.sent += now_->moves_first_->bytes_sent();
      return now_->moves_first_;
    });
    queue_second_ = second_.lane->make_exchange(phase, reduction, {}, label_);
    queue_second_->defer([this] {
      const std::shared_ptr<Exchange> self = std::move(self_);
      queue_first_->wait();
      *second_.sent += now_->moves_second_->bytes_sent();
      return now_->moves_second_;
    });
  }

  // Nobody else may hold it while it moves.
  void submit(std::shared_ptr<Exchange> self) {
    self_ = std::move(self);
    first_.lane->submit(queue_first_);
    second_.lane->submit(queue_second_);
  }

  // On a GPU: what was queued on this stream, a wait for the first level, comes before whoever waits. The
  // second level's own wait says nothing of it where this place has nothing to move there.
  void note_queued(const c10::Stream& stream) {
    if (!queued_) queued_.emplace(stream.device_type());
    queued_->record(stream);
  }

  // The second level's failure says why the first one failed, too.
  void wait() override {
    try {
      queue_second_->wait();
      if (queued_) {
        const c10::impl::VirtualGuardImpl guard(queued_->device_type());
        queued_->block(guard.getStream(parts_.front().full.device()));
      }
    } catch (...) {
      if (queue_second_->done()) self_.reset();  // its turn never comes
      throw;
    }
  }
  bool done() override { return queue_second_->done(); }
  int64_t start_ns() const override { return queue_first_->start_ns(); }
  int64_t end_ns() const override { return queue_second_->end_ns(); }
  int64_t bytes_sent() const override {
    return moves_first_ ? moves_first_->bytes_sent() + moves_second_->bytes_sent() : 0;
  }

 private:
  const Level first_;
  const Level second_;
  std::shared_ptr<Exchange> moves_first_;  // null where this exchange is made by another, when its turn comes
  std::shared_ptr<Exchange> moves_second_;
  std::shared_ptr<Exchange> queue_first_;
  std::shared_ptr<Exchange> queue_second_;
  std::shared_ptr<Exchange> self_;   // until the second level begins
  TwoLevelExchange* now_ = nullptr;  // what is moved: this, or what it was deferred to
  std::optional<c10::Event> queued_;
};

}  // namespace

TwoLevelLane::TwoLevelLane(std::shared_ptr<Lane> inside, std::shared_ptr<Lane> between, Nodes nodes)
    : inside_(std::move(inside)), between_(std::move(between)), nodes_(std::move(nodes)) {
  TORCH_CHECK_VALUE(nodes_.size() == static_cast<size_t>(between_->world()) &&
                        std::all_of(nodes_.begin(), nodes_.end(),
                                    [this](const std::vector<int>& node) {
                                      return node.size() == static_cast<size_t>(inside_->world());
                                    }),
                    "nodes must be ", between_->world(), " lists of ", inside_->world(), " ranks each.");
}

std::shared_ptr<Exchange> TwoLevelLane::make_exchange(Phase phase, Reduction reduction,
                                                      std::vector<Part> parts, std::string label) {
  TORCH_CHECK(phase != Phase::kAllToAll, "Two levels have no all-to-all: use a lane over all ranks.");
  return std::make_shared<TwoLevelExchange>(phase, reduction, std::move(parts), std::move(label),
                                            Level{inside_, sent_inside_}, Level{between_, sent_between_},
                                            nodes_);
}

void TwoLevelLane::submit(const std::shared_ptr<Exchange>& exchange) {
  auto& both = static_cast<TwoLevelExchange&>(*exchange);
  if (exchange->parts().empty() || exchange->parts().front().full.is_cpu()) return both.submit(exchange);
  const c10::Device device = exchange->parts().front().full.device();
  const c10::impl::VirtualGuardImpl guard(device.type());
  if (!stream_) {
    stream_ = guard.getStreamFromGlobalPool(device, /*isHighPriority=*/true);
    called_.emplace(device.type());
  }
  called_->record(guard.getStream(device));
  called_->block(*stream_);
  const c10::StreamGuard on(*stream_);
  both.submit(exchange);
  both.note_queued(*stream_);
}

void TwoLevelLane::abort(const std::string& reason) {
  inside_->abort(reason);
  between_->abort(reason);
}

}  // namespace dear
