#include "collectives/ring_transfer.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstring>

#include "collectives/accumulate.h"
#include "collectives/frame.h"

namespace dear {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// Note [Who is to blame]
// In a ring a rank that waits sees only its neighbour wait, and would blame it. So a rank that is starved for
// a quarter of the timeout tells the next one for whom it waits (kWaiting), and a rank that fails tells the
// next one why (kFailure); both pass it on. The ring without the dead rank is a line, along which the news
// reaches all.

class RingTransfer {
 public:
  RingTransfer(const Exchange& exchange, const RingPlan& plan, const RingLinks& links,
               std::vector<char>& scratch, const TransferContext& context)
      : exchange_(exchange),
        plan_(plan),
        links_(links),
        scratch_(scratch),
        context_(context),
        next_((context.rank + 1) % context.world),
        prev_((context.rank + context.world - 1) % context.world),
        blamed_(prev_),
        forwards_(exchange.phase() == Phase::kAllGather),
        averages_(exchange.reduction() == Reduction::kAverage) {
    if (!forwards_) {
      const size_t need = (plan.slots + 1) * static_cast<size_t>(plan.largest_piece);
      if (scratch_.size() < need) scratch_.resize(need);
    }
  }

  void run() {
    try {
      progressed();
      while (received_ < plan_.inbound.size() || sent_ < plan_.outbound.size()) {
        while (!send_blocked_ && send_some()) {
        }
        wait_for_network();
      }
    } catch (const std::exception& error) {
      tell_next(error.what());
      ::shutdown(links_.to_next(), SHUT_RDWR);
      ::shutdown(links_.from_prev(), SHUT_RDWR);
      throw;
    }
  }

 private:
  // --- sending ---

  char* slot(const Piece& received) {
    return scratch_.data() + received.slot * static_cast<size_t>(plan_.largest_piece);
  }

  bool next_piece_ready() const {
    return sent_ < plan_.outbound.size() && static_cast<int64_t>(received_) > plan_.outbound[sent_].source;
  }

  const char* outbound_data() {
    const Piece& piece = plan_.outbound[sent_];
    return forwards_ || piece.source < 0 ? piece.own : slot(plan_.inbound[static_cast<size_t>(piece.source)]);
  }

  // Sends as much of the current frame as the socket takes; false when there is nothing to send or no room.
  bool send_some() {
    if (out_offset_ == 0) {
      if (!next_piece_ready()) return false;
      out_header_ = {kMagic,
                     FrameType::kData,
                     0,
                     context_.sequence,
                     plan_.signature,
                     static_cast<uint64_t>(plan_.outbound[sent_].bytes)};
    }
    const size_t bytes = static_cast<size_t>(plan_.outbound[sent_].bytes);
    iovec blocks[2];
    const int count =
        frame_blocks(out_header_, const_cast<char*>(outbound_data()), bytes, out_offset_, blocks);
    msghdr message{};
    message.msg_iov = blocks;
    message.msg_iovlen = static_cast<size_t>(count);
    const ssize_t put = ::sendmsg(links_.to_next(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (put < 0) {
      if (errno == EINTR) return true;
      send_blocked_ = true;
      if (errno != EAGAIN) lost_next(errno);
      return false;
    }
    progressed();
    out_offset_ += static_cast<size_t>(put);
    if (out_offset_ == sizeof(FrameHeader) + bytes) {
      out_offset_ = 0;
      if (!forwards_ && plan_.outbound[sent_].source >= 0) --waiting_sums_;
      ++sent_;
    } else {
      send_blocked_ = true;
    }
    return true;
  }

  // The next rank is gone, or it gave up because of somebody else: in that case the news is on its way round.
  void lost_next(int error) {
    next_lost_ = true;
    next_lost_error_ = error;
    next_lost_deadline_ = Clock::now() + std::min<milliseconds>(context_.timeout / 4, milliseconds(2000));
  }

  void send_control(FrameType type, int blamed, const std::string& text) {
    std::vector<char> frame(sizeof(FrameHeader) + text.size());
    const FrameHeader header{kMagic,          type,       static_cast<uint16_t>(blamed), context_.sequence,
                             plan_.signature, text.size()};
    std::memcpy(frame.data(), &header, sizeof(header));
    std::memcpy(frame.data() + sizeof(header), text.data(), text.size());
    push(links_.to_next(), frame.data(), frame.size(), milliseconds(1000));
  }

  void tell_next(const std::string& reason) {
    if (next_lost_) return;
    if (out_offset_ > 0) {  // finish the frame that is under way; its content no longer matters
      const size_t bytes = static_cast<size_t>(plan_.outbound[sent_].bytes);
      if (out_offset_ < sizeof(FrameHeader)) {
        const char* rest = reinterpret_cast<const char*>(&out_header_) + out_offset_;
        if (!push(links_.to_next(), rest, sizeof(FrameHeader) - out_offset_, milliseconds(2000))) return;
        out_offset_ = sizeof(FrameHeader);
      }
      const size_t done = out_offset_ - sizeof(FrameHeader);
      if (!push(links_.to_next(), outbound_data() + done, bytes - done, milliseconds(2000))) return;
    }
    send_control(FrameType::kFailure, blamed_, reason.substr(0, kLongestNews));
  }

  // --- receiving ---

  bool slot_free() const {
    return forwards_ || plan_.inbound[received_].out != nullptr ||
           waiting_sums_ < static_cast<int64_t>(plan_.slots);
  }

  char* inbound_data() {
    const Piece& piece = plan_.inbound[received_];
    return forwards_ ? piece.out : slot(piece);
  }

  size_t inbound_bytes() const { return static_cast<size_t>(plan_.inbound[received_].bytes); }

  size_t frame_bytes() const { return sizeof(FrameHeader) + inbound_bytes(); }

  // What must have arrived before it is worth waking up: the rest of the frame. Only the first header of an
  // exchange is looked at on its own: a neighbour that is in another collective may never send as much.
  size_t wanted() const {
    if (received_ == 0 && in_offset_ < sizeof(FrameHeader)) return sizeof(FrameHeader) - in_offset_;
    return frame_bytes() - in_offset_;
  }

  void want(size_t bytes) {
    if (bytes == low_water_) return;
    low_water_ = bytes;
    set_low_water(links_.from_prev(), bytes);
  }

  void receive_some() {
    const size_t before = in_offset_;
    iovec blocks[2];
    const int count = frame_blocks(in_header_, inbound_data(), inbound_bytes(), before, blocks);
    msghdr message{};
    message.msg_iov = blocks;
    message.msg_iovlen = static_cast<size_t>(count);
    const ssize_t got = ::recvmsg(links_.from_prev(), &message, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (got <= 0) {
      blame(prev_, got == 0 ? complaint::closed() : complaint::lost(errno));
    }
    in_offset_ += static_cast<size_t>(got);
    if (before < sizeof(FrameHeader) && in_offset_ >= sizeof(FrameHeader)) check_header();
    if (in_offset_ < frame_bytes()) {
      if (in_header_.type == FrameType::kData) progressed();
      return;
    }
    in_offset_ = 0;
    if (in_header_.type == FrameType::kData) {
      progressed();
      take_piece();
    } else if (in_header_.blamed != context_.rank && in_header_.blamed != blamed_) {
      blamed_ = in_header_.blamed;
      starved_told_ = -1;  // pass it on
    }
  }

  void check_header() {
    if (in_header_.magic != kMagic) blame(prev_, complaint::corrupt());
    if (in_header_.type == FrameType::kFailure) take_failure();
    if (in_header_.sequence != context_.sequence || in_header_.signature != plan_.signature ||
        in_header_.bytes != inbound_bytes()) {
      blame(prev_, complaint::elsewhere());
    }
  }

  // Another rank has failed: its words become ours. The first of them came with the header.
  void take_failure() {
    const size_t came = std::min<uint64_t>(in_header_.bytes, in_offset_ - sizeof(FrameHeader));
    const std::string text = read_news(links_.from_prev(), std::string(inbound_data(), came), in_header_);
    blamed_ = in_header_.blamed;
    throw std::runtime_error(text);
  }

  void take_piece() {
    const Piece& piece = plan_.inbound[received_];
    if (!forwards_) {
      const bool last = piece.out != nullptr;
      char* partial = slot(piece);
      const AddRule rule =
          averages_ ? average_rule(piece.type, context_.world, !piece.summed, last) : AddRule{};
      accumulate(piece.type, last ? piece.out : partial, partial, piece.own, piece.count, rule);
    }
    if (!forwards_ && piece.out == nullptr) ++waiting_sums_;
    ++received_;
  }

  // --- waiting ---

  void progressed() {
    last_progress_ = Clock::now();
    starved_told_ = -1;
  }

  void wait_for_network() {
    const bool receiving = received_ < plan_.inbound.size() && slot_free();
    const bool sending = !next_lost_ && (out_offset_ > 0 || next_piece_ready());
    if (!receiving && !sending && received_ == plan_.inbound.size() && sent_ == plan_.outbound.size()) return;
    if (receiving) want(wanted());
    pollfd entries[3] = {{receiving ? links_.from_prev() : -1, POLLIN, 0},
                         {sending && send_blocked_ ? links_.to_next() : -1, POLLOUT, 0},
                         {context_.wake_fd, POLLIN, 0}};
    if (sending && !send_blocked_) return;  // a piece became ready meanwhile
    const int events = ::poll(entries, 3, patience());
    if (events < 0 && errno != EINTR)
      blame(context_.rank, std::string("could not poll: ") + std::strerror(errno));
    if (entries[2].revents != 0) {
      const std::string reason = context_.abort_reason();
      if (!reason.empty()) throw std::runtime_error(reason);
    }
    if (entries[1].revents != 0) send_blocked_ = false;
    if (entries[0].revents != 0) receive_some();
    check_deadlines();
  }

  milliseconds since_progress() const {
    return std::chrono::duration_cast<milliseconds>(Clock::now() - last_progress_);
  }

  // Milliseconds until the next deadline: telling the next rank, giving up, or giving up on news.
  int patience() const {
    auto left = context_.timeout - since_progress();
    if (starved_told_ != blamed_) left = std::min(left, context_.timeout / 4 - since_progress());
    if (next_lost_) {
      left = std::min(left, std::chrono::duration_cast<milliseconds>(next_lost_deadline_ - Clock::now()));
    }
    return static_cast<int>(std::clamp<int64_t>(left.count() + 1, 1, 60'000));
  }

  void check_deadlines() {
    if (next_lost_ && Clock::now() >= next_lost_deadline_) {
      blame(next_, std::string("closed its connection (") + std::strerror(next_lost_error_) + ")");
    }
    const auto quiet = since_progress();
    if (quiet < context_.timeout / 4) return;
    const bool waits_for_prev = received_ < plan_.inbound.size() && !send_blocked_;
    const int culprit = waits_for_prev || blamed_ != prev_ ? blamed_ : next_;
    if (quiet >= context_.timeout) {
      blamed_ = culprit;
      blame(culprit, complaint::silent(context_.timeout));
    }
    if (starved_told_ != blamed_ && out_offset_ == 0 && sent_ < plan_.outbound.size() && !next_lost_) {
      starved_told_ = blamed_;
      // As long as the frame it stands in for, since the receiver sleeps until so much has come.
      send_control(FrameType::kWaiting, blamed_,
                   std::string(static_cast<size_t>(plan_.outbound[sent_].bytes), '\0'));
    } else {
      starved_told_ = blamed_;
    }
  }

  [[noreturn]] void blame(int rank, const std::string& what) {
    blamed_ = rank;
    throw std::runtime_error("Rank " + std::to_string(rank) + " " + what + " during the " +
                             phase_name(exchange_.phase()) + " of " + exchange_.label() + ", as rank " +
                             std::to_string(context_.rank) + " saw it.");
  }

  const Exchange& exchange_;
  const RingPlan& plan_;
  const RingLinks& links_;
  std::vector<char>& scratch_;
  const TransferContext& context_;
  const int next_;
  const int prev_;
  int blamed_;  // who holds us up, as far as we know
  const bool forwards_;
  const bool averages_;
  int64_t waiting_sums_ = 0;  // partial sums received and not yet sent on

  size_t sent_ = 0;        // pieces
  size_t out_offset_ = 0;  // bytes of the current frame, header included
  FrameHeader out_header_{};
  bool send_blocked_ = false;
  bool next_lost_ = false;
  int next_lost_error_ = 0;
  Clock::time_point next_lost_deadline_;

  size_t received_ = 0;
  size_t in_offset_ = 0;
  FrameHeader in_header_{};
  size_t low_water_ = 0;

  Clock::time_point last_progress_;
  int starved_told_ = -1;  // the rank we last told the next one about in this silence
};

}  // namespace

void run_ring_transfer(const Exchange& exchange, const RingPlan& plan, const RingLinks& links,
                       std::vector<char>& scratch, const TransferContext& context) {
  RingTransfer(exchange, plan, links, scratch, context).run();
}

}  // namespace dear
