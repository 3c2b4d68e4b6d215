#include "collectives/ring_transfer.h"

#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>

#include "collectives/accumulate.h"
#include "collectives/frame.h"

namespace dear {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

class RingTransfer {
 public:
  RingTransfer(const Exchange& exchange, const RingPieces& pieces, const RingLinks& links,
               RingScratch& scratch, const TransferContext& context)
      : exchange_(exchange),
        pieces_(pieces),
        links_(links),
        scratch_(scratch),
        context_(context),
        next_(context.members.next()),
        prev_(context.members.previous()),
        blamed_(prev_),
        next_waits_for_(next_),
        forwards_(exchange.phase() == Phase::kAllGather),
        averages_(exchange.reduction() == Reduction::kAverage) {
    if (!forwards_) {
      const size_t need = (pieces.slots + 1) * slot_bytes(pieces);
      if (scratch_.slots.size() < need) scratch_.slots.resize(need);
    }
    if (scratch_.checks.size() < pieces.inbound.size()) scratch_.checks.resize(pieces.inbound.size());
  }

  bool run() {
    context_.host.progress(next_).begin();
    context_.host.progress(prev_).begin();
    try {
      progressed();
      while (received_ < pieces_.inbound.size() || sent_ < pieces_.outbound.size()) {
        while (!send_blocked_ && send_some()) {
        }
        wait_for_network();
      }
      return next_left_;
    } catch (const Failure& failure) {
      const Failure news = context_.host.publish(failure);
      tell(news);
      throw Failure(news);
    }
  }

 private:
  // --- sending ---

  // A slot may hold elements of any type, and a piece any number of bytes.
  static size_t slot_bytes(const RingPieces& pieces) {
    constexpr size_t kAligned = 64;
    return (static_cast<size_t>(pieces.largest_piece) + kAligned - 1) / kAligned * kAligned;
  }

  char* slot(const Piece& received) { return scratch_.slots.data() + received.slot * slot_bytes(pieces_); }

  bool next_piece_ready() const {
    return sent_ < pieces_.outbound.size() &&
           static_cast<int64_t>(received_) > pieces_.outbound[sent_].source;
  }

  const char* outbound_data() {
    const Piece& piece = pieces_.outbound[sent_];
    return forwards_ || piece.source < 0 ? piece.own
                                         : slot(pieces_.inbound[static_cast<size_t>(piece.source)]);
  }

  FrameHeader header(FrameType type, int blamed) const {
    const auto bytes = static_cast<size_t>(pieces_.outbound[sent_].bytes);
    return make_header(type, blamed, context_.sequence, pieces_.signature, bytes, context_.check);
  }

  void begin_frame() {
    const int64_t source = pieces_.outbound[sent_].source;
    const FrameHeader data = header(FrameType::kData, 0);
    if (source < 0) {
      out_.begin(data, outbound_data(), context_.check);
    } else {
      out_.begin(data, outbound_data(), scratch_.checks[static_cast<size_t>(source)]);
    }
  }

  // Sends as much of the current frame as the socket takes; false when there is nothing to send or no room.
  bool send_some() {
    if (!out_.begun()) {
      if (!next_piece_ready()) return false;
      begin_frame();
    }
    const Flow flow = out_.send(links_.to_next());
    if (flow == Flow::kLost) lose_next(complaint::lost(errno));
    send_blocked_ = flow != Flow::kDone;
    if (flow == Flow::kBlocked) return false;
    progressed();
    if (flow == Flow::kDone) {
      if (!forwards_ && pieces_.outbound[sent_].source >= 0) --waiting_sums_;
      context_.host.progress(next_).note_sent(pieces_.outbound[sent_].bytes);
      ++sent_;
    }
    return flow == Flow::kDone;
  }

  // The next rank takes nothing any more. It has said why, if it could.
  [[noreturn]] void lose_next(const std::string& what) {
    bool remarked = false;
    const std::optional<Word> word = read_last_word(&remarked);
    if (word && word->type == FrameType::kFailure) throw Failure(word->text, {word->blamed});
    if (word) blame(next_, complaint::left(next_, word->text));
    blame_lost(next_, what);
  }

  // What the next rank has said, behind its remarks, if there were any.
  std::optional<Word> read_last_word(bool* remarked) {
    while (true) {
      const std::optional<Word> word = read_word(links_.to_next(), context_.ranks, context_.check);
      if (!word || word->type != FrameType::kWaiting) return word;
      *remarked = true;
      next_waits_for_ = word->blamed == context_.members.rank() ? next_ : word->blamed;
    }
  }

  // The next rank has said something, or hung up, which matters only to who has not sent all.
  void hear_next() {
    bool remarked = false;
    const std::optional<Word> word = read_last_word(&remarked);
    if (remarked && !word && !hung_up(links_.to_next())) return;
    next_heard_ = true;
    if (word && word->type == FrameType::kFailure) throw Failure(word->text, {word->blamed});
    if (next_left_ = word.has_value(); sent_ == pieces_.outbound.size()) return;
    if (word) blame(next_, complaint::left(next_, word->text));
    blame_lost(next_, complaint::closed());
  }

  void tell(const Failure& failure) {
    const FrameType type = failure.leaving ? FrameType::kLeft : FrameType::kFailure;
    const int blamed = failure.blamed.back();
    push_text(links_.from_prev(), type, blamed, failure.what(), context_.check, milliseconds(200));
    ::shutdown(links_.from_prev(), SHUT_WR);
    // The frame that is under way is finished; its content no longer matters.
    if (out_.finish(links_.to_next(), milliseconds(2000)))
      push_text(links_.to_next(), type, blamed, failure.what(), context_.check, milliseconds(1000));
    ::shutdown(links_.to_next(), SHUT_WR);
  }

  // --- receiving ---

  bool slot_free() const {
    return forwards_ || pieces_.inbound[received_].out != nullptr ||
           waiting_sums_ < static_cast<int64_t>(pieces_.slots);
  }

  char* inbound_data() {
    const Piece& piece = pieces_.inbound[received_];
    return forwards_ ? piece.out : slot(piece);
  }

  size_t inbound_bytes() const { return static_cast<size_t>(pieces_.inbound[received_].bytes); }

  // What must have arrived before it is worth waking up: the rest of the frame. Only the first header of an
  // exchange is looked at on its own: a neighbour that is in another collective may never send as much.
  size_t wanted() const {
    const bool first = received_ == 0 && in_.moved() < sizeof(FrameHeader);
    return (first ? sizeof(FrameHeader) : frame_bytes(inbound_bytes())) - in_.moved();
  }

  void want(size_t bytes) {
    if (bytes == low_water_) return;
    low_water_ = bytes;
    set_low_water(links_.from_prev(), bytes);
  }

  void receive_some() {
    Flow flow = in_.receive(links_.from_prev(), inbound_data(), inbound_bytes());
    if (flow == Flow::kBlocked) return;
    if (flow == Flow::kLost) blame_lost(prev_, errno == 0 ? complaint::closed() : complaint::lost(errno));
    while (in_.header_is_new() && is_remark(in_.header())) flow = hear_remark();
    if (in_.moved() < sizeof(FrameHeader)) return;
    if (in_.header_is_new()) check_header();
    const FrameHeader& header = in_.header();
    if (header.type == FrameType::kData) progressed();
    if (flow != Flow::kDone) return;
    in_.next();
    if (header.type == FrameType::kData) {
      take_piece();
    } else if (!intact(inbound_data(), header.bytes)) {
      blame(prev_, complaint::damaged());
    } else {
      wait_for(header.blamed);
    }
  }

  // The previous rank has nothing to send, since it waits for rank `culprit`; itself: for nobody any more.
  void wait_for(int culprit) {
    if (culprit == context_.members.rank() || culprit == blamed_) return;
    blamed_ = culprit;
    starved_told_ = -1;  // pass it on
  }

  // The previous rank is not in this exchange, and says for whom it waits elsewhere.
  Flow hear_remark() {
    const FrameHeader remark = in_.header();
    if (!valid(remark, context_.ranks, context_.check)) blame(prev_, complaint::corrupt());
    const Flow flow = in_.take_remark(links_.from_prev(), inbound_data(), context_.check);
    low_water_ = 1;  // which reading it has set
    if (flow == Flow::kLost) blame(prev_, complaint::damaged());
    wait_for(remark.blamed);
    return flow;
  }

  void check_header() {
    const FrameHeader& header = in_.header();
    if (!valid(header, context_.ranks, context_.check)) blame(prev_, complaint::corrupt());
    if (header.type == FrameType::kFailure) throw Failure(text_begun(), {header.blamed});
    if (header.type == FrameType::kLeft) blame(prev_, complaint::left(prev_, text_begun()));
    if (header.sequence != context_.sequence || header.signature != pieces_.signature ||
        header.bytes != inbound_bytes()) {
      blame(prev_, complaint::elsewhere());
    }
  }

  // The text of a kFailure or kLeft frame, whose first bytes came with the header.
  std::string text_begun() {
    return read_text(links_.from_prev(), in_.begun(inbound_data()), in_.header(), context_.check);
  }

  bool intact(const char* content, size_t bytes) const {
    return content_check(content, bytes, context_.check) == in_.check();
  }

  void take_piece() {
    const Piece& piece = pieces_.inbound[received_];
    if (!forwards_ && piece.bytes > 0) {
      add(piece);
    } else if (!intact(inbound_data(), in_.header().bytes)) {
      blame(prev_, complaint::damaged());
    } else {
      scratch_.checks[received_] = in_.check();
    }
    if (!forwards_ && piece.out == nullptr) ++waiting_sums_;
    context_.host.progress(prev_).note_received(piece.bytes);
    ++received_;
    blamed_ = prev_;  // whomever it waited for has come
  }

  // See Note [Checksums in the cache].
  void add(const Piece& piece) {
    constexpr int64_t kBlock = 16 << 10;  // bytes, a third of a usual first-level cache
    const bool last = piece.out != nullptr;
    const char* came = slot(piece);
    char* sum = last ? piece.out : slot(piece);
    const AddRule rule =
        averages_ ? average_rule(piece.type, context_.members.size(), !piece.summed, last) : AddRule{};
    const int64_t size = piece.bytes / piece.count;
    uint32_t check_in = context_.check.seed;
    uint32_t check_out = context_.check.seed;
    for (int64_t at = 0; at < piece.bytes; at += kBlock) {
      const int64_t bytes = std::min(kBlock, piece.bytes - at);
      check_in = content_check(came + at, static_cast<size_t>(bytes), context_.check, check_in);
      accumulate(piece.type, sum + at, came + at, piece.own + at, bytes / size, rule);
      if (!last) check_out = content_check(sum + at, static_cast<size_t>(bytes), context_.check, check_out);
    }
    if (check_in != in_.check()) blame(prev_, complaint::damaged());
    scratch_.checks[received_] = check_out;
  }

  // --- waiting ---

  void progressed() {
    last_progress_ = Clock::now();
    starved_told_ = -1;
    if (!held_up_) return;
    held_up_ = false;
    context_.host.held_up(context_.members.rank());
  }

  void wait_for_network() {
    const bool receiving = received_ < pieces_.inbound.size() && slot_free();
    const bool sending = out_.begun() || next_piece_ready();
    if (!receiving && !sending && received_ == pieces_.inbound.size() && sent_ == pieces_.outbound.size())
      return;
    if (sending && !send_blocked_) return;  // a piece became ready meanwhile
    if (receiving) want(wanted());
    const short of_next = static_cast<short>((sending ? POLLOUT : 0) | (next_heard_ ? 0 : POLLIN));
    pollfd entries[3] = {{receiving ? links_.from_prev() : -1, POLLIN, 0},
                         {of_next != 0 ? links_.to_next() : -1, of_next, 0},
                         {context_.wake_fd, POLLIN, 0}};
    const int events = ::poll(entries, 3, patience());
    if (events < 0 && errno != EINTR)
      blame(context_.members.rank(), std::string("could not poll: ") + std::strerror(errno));
    if (events > 0) take_events(entries);
    check_deadlines();
  }

  void take_events(const pollfd* entries) {
    if (entries[2].revents != 0) {
      if (const auto why = context_.host.ending()) throw Failure(*why);
    }
    if (entries[1].revents != 0) send_blocked_ = false;
    if ((entries[1].revents & POLLOUT) != 0) next_waits_for_ = next_;  // it takes something again
    if (entries[0].revents != 0) receive_some();
    if ((entries[1].revents & ~POLLOUT) != 0 && !next_heard_) hear_next();
  }

  milliseconds since_progress() const {
    return std::chrono::duration_cast<milliseconds>(Clock::now() - last_progress_);
  }

  // How long this rank waits before it blames. See Note [Who speaks first].
  milliseconds limit() const {
    const bool sees_it = pieces_.inbound.empty() || (received_ > 0 && blamed_ == prev_);
    return context_.limit(!sees_it);
  }

  // Milliseconds until the next deadline: telling the others, or giving up.
  int patience() const {
    const auto quiet = since_progress();
    const auto quarter = std::max(context_.timeout / 4, milliseconds(1));
    auto left = limit() - quiet;
    if (quiet >= quarter) left = std::min(left, std::min(quarter, milliseconds(1000)));
    if (starved_told_ != blamed_) left = std::min(left, quarter - quiet);
    return static_cast<int>(std::clamp<int64_t>(left.count() + 1, 1, 60'000));
  }

  void check_deadlines() {
    const auto quiet = since_progress();
    if (quiet < context_.timeout / 4) return;
    const bool waits_for_prev = received_ < pieces_.inbound.size() && !send_blocked_;
    const int culprit = waits_for_prev || blamed_ != prev_ ? blamed_ : next_waits_for_;
    if (quiet >= limit()) blame(culprit, complaint::silent(limit()));
    held_up_ = true;
    // Again and again: a lane that was busy the last time may be idle now, and may have news.
    if (const auto news = context_.host.held_up(culprit)) throw Failure(*news);
    if (starved_told_ != blamed_ && !out_.under_way() && sent_ < pieces_.outbound.size()) tell_starved();
    starved_told_ = blamed_;
  }

  // As long as the frame it comes instead of, since the receiver sleeps until so much has come.
  void tell_starved() {
    const FrameHeader waiting = header(FrameType::kWaiting, blamed_);
    const std::vector<char> frame =
        make_frame(waiting, std::vector<char>(waiting.bytes).data(), context_.check);
    push(links_.to_next(), frame.data(), frame.size(), milliseconds(1000));
  }

  [[noreturn]] void blame(int rank, const std::string& what) const {
    throw make_failure({rank}, what, phase_name(exchange_.phase()), exchange_.label(),
                       context_.members.rank());
  }

  // A neighbour is gone that gave no reason here.
  [[noreturn]] void blame_lost(int rank, const std::string& what) const {
    throw Failure(context_.host.explain_loss(rank, what, exchange_));
  }

  const Exchange& exchange_;
  const RingPieces& pieces_;
  const RingLinks& links_;
  RingScratch& scratch_;
  const TransferContext& context_;
  const int next_;
  const int prev_;
  int blamed_;  // who holds us up, as far as we know
  int next_waits_for_;
  const bool forwards_;
  const bool averages_;
  int64_t waiting_sums_ = 0;  // partial sums received and not yet sent on

  size_t sent_ = 0;  // pieces
  OutFrame out_;
  bool send_blocked_ = false;
  bool next_heard_ = false, next_left_ = false;  // what it had to say has been read; it was that it leaves

  size_t received_ = 0;  // pieces
  InFrame in_;
  size_t low_water_ = 0;

  Clock::time_point last_progress_;
  int starved_told_ = -1;  // the rank we last told the next one about in this silence
  bool held_up_ = false;   // and the other lanes
};

}  // namespace

bool run_ring_transfer(const Exchange& exchange, const RingPieces& pieces, const RingLinks& links,
                       RingScratch& scratch, const TransferContext& context) {
  return RingTransfer(exchange, pieces, links, scratch, context).run();
}

}  // namespace dear
