#include "collectives/ring.h"

#include <sys/socket.h>

#include "collectives/accumulate.h"
#include "collectives/ring_pieces.h"
#include "collectives/staging.h"

namespace dear {
namespace {

constexpr int64_t kShortRange = 16 << 10;  // bytes; see Note [Staging]

class RingExchange : public Exchange {
 public:
  RingExchange(Phase phase, Reduction reduction, Staging staging, std::string label, int rank, int world)
      : Exchange(phase, reduction, staging.parts(), std::move(label), world),
        staging_(std::move(staging)),
        pieces_(make_ring_pieces(*this, rank, world)) {}
  const RingPieces& pieces() const { return pieces_; }
  Staging& staging() { return staging_; }
  int64_t bytes_sent() const override {
    int64_t total = 0;
    for (const Piece& piece : pieces_.outbound) total += piece.bytes;
    return total;
  }

 private:
  Staging staging_;
  RingPieces pieces_;
};

// A world of one: the reduce-scatter's result is what it reads.
void copy_chunk(const Part& part) {
  const auto owners = owners_of(part, 1);
  for (const Range& range : owners->ranges(0)) {
    const at::Tensor from = part.full.narrow(0, range.begin, range.size());
    at::Tensor to = part.shard.narrow(0, range.at, range.size());
    if (to.data_ptr() != from.data_ptr()) to.copy_(from);
  }
}

}  // namespace

RingLane::RingLane(std::shared_ptr<Peers> peers, const c10::intrusive_ptr<c10d::Store>& store,
                   const std::string& key, std::chrono::milliseconds timeout, std::vector<int> ranks)
    : HostLane(std::move(peers), key, timeout, std::move(ranks)) {
  if (world_ > 1) links_ = std::make_unique<RingLinks>(*peers_, members_, store, key, timeout);
  start();
}

RingLane::~RingLane() { stop(); }

std::shared_ptr<Exchange> RingLane::make_exchange(Phase phase, Reduction reduction, std::vector<Part> parts,
                                                  std::string label) {
  TORCH_CHECK(phase != Phase::kAllToAll, "A ring has no all-to-all: use a mesh.");
  for (const Part& part : parts) {
    TORCH_CHECK(part.full.device().is_cpu(), "The ring moves host tensors, and one on ", part.full.device(),
                " was given: use the native collectives of that device's backend.");
    if (phase == Phase::kReduceScatter) check_summable(part.full.scalar_type());
  }
  Staging staging(std::move(parts), phase, rank_, world_, kShortRange, Chunks::kPacked);
  return std::make_shared<RingExchange>(phase, reduction, std::move(staging), std::move(label), rank_,
                                        world_);
}

void RingLane::transfer(Exchange& exchange, const TransferContext& context) {
  auto& moved = static_cast<RingExchange&>(exchange);
  const RingPieces& pieces = moved.pieces();
  moved.staging().pack();
  if (world_ == 1) {
    for (const Part& part : exchange.parts()) {
      if (exchange.phase() == Phase::kReduceScatter) copy_chunk(part);
    }
  } else if (!pieces.inbound.empty() || !pieces.outbound.empty()) {
    // It may have ended its part, and left, before this rank's part ended: no death is to be seen in that.
    if (run_ring_transfer(exchange, pieces, *links_, scratch_, context)) next_left_ = true;
  }
  moved.staging().unpack();
}

void RingLane::tell(FrameType type, const Failure& failure) {
  if (!links_) return;
  for (const int neighbour : {links_->from_prev(), links_->to_next()}) {
    push_text(neighbour, type, failure.blamed.back(), failure.what(), peers_->check(),
              std::chrono::milliseconds(200));
    ::shutdown(neighbour, SHUT_WR);
  }
}

void RingLane::remark(int culprit) {
  if (!links_) return;
  push_remark(links_->from_prev(), culprit, peers_->check());
  push_remark(links_->to_next(), culprit, peers_->check());
}

std::optional<Failure> RingLane::find_news() {
  if (!links_) return std::nullopt;
  std::optional<Word> word;
  do {
    word = read_word(links_->to_next(), peers_->world(), peers_->check());
  } while (word && word->type == FrameType::kWaiting);
  if (word && word->type == FrameType::kLeft) next_left_ = true;
  if (!word || word->type != FrameType::kFailure) return std::nullopt;
  return Failure(word->text, {word->blamed});
}

std::vector<int> RingLane::find_gone() const {
  std::vector<int> ranks;
  if (links_ && !next_left_ && hung_up(links_->to_next())) ranks.push_back(members_.next());
  if (links_) drop_remarks(links_->from_prev());
  if (links_ && hung_up(links_->from_prev())) ranks.push_back(members_.previous());
  return ranks;
}

bool RingLane::open_to(int peer) const {
  if (!links_) return false;
  return (peer == members_.next() && still_open(links_->to_next())) ||
         (peer == members_.previous() && still_open(links_->from_prev()));
}

bool RingLane::all_hung_up() const {
  return !links_ || (hung_up(links_->to_next()) && hung_up(links_->from_prev()));
}

std::vector<int> RingLane::connections() const {
  return links_ ? std::vector<int>{links_->to_next(), links_->from_prev()} : std::vector<int>{};
}

}  // namespace dear
