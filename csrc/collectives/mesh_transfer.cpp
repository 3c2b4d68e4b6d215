#include "collectives/mesh_transfer.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace dear {

using std::chrono::milliseconds;

namespace {

constexpr int64_t kPiece = 256 << 10;  // bytes; what must be finished before news can be sent

milliseconds since(std::chrono::steady_clock::time_point then) {
  return std::chrono::duration_cast<milliseconds>(std::chrono::steady_clock::now() - then);
}

}  // namespace

MeshTransfer::MeshTransfer(const MeshLinks& links, const Members& members) {
  for (int distance = 1; distance < members.size(); ++distance) {
    const int peer = members.after(distance);
    const int place = (members.place() + distance) % members.size();
    peers_.push_back({peer, place, links.to(peer), {}, {}, {}, {}, false, false, false, 0, {}, peer});
  }
  entries_.resize(peers_.size() + 1);
}

void MeshTransfer::run(const Exchange& exchange, const TransferContext& context) {
  exchange_ = &exchange;
  context_ = &context;
  signature_ = exchange.signature();
  width_ = 1;
  held_up_ = false;
  progress_ = Clock::now();
  for (Peer& peer : peers_) {
    peer = {peer.rank, peer.place, peer.fd, {}, {}, {}, {}, false, false, false, 0, progress_, peer.rank};
    find_piece(peer.to);
    find_piece(peer.from);
    context.host.progress(peer.rank).begin();
  }
  try {
    send();
    copy_own();
    while (!finished()) {
      wait_for_network();
      send();
    }
  } catch (const Failure& failure) {
    const Failure news = context.host.publish(failure);
    tell(news.leaving ? FrameType::kLeft : FrameType::kFailure, news, context.check);
    throw Failure(news);
  }
}

// --- pieces ---

int64_t MeshTransfer::chunk_bytes(size_t part) const {
  return static_cast<int64_t>(exchange_->parts()[part].full.nbytes()) / context_->members.size();
}

size_t MeshTransfer::piece_bytes(const Stream& stream) const {
  if (stream.part == exchange_->parts().size()) return 0;
  return static_cast<size_t>(std::min(kPiece, chunk_bytes(stream.part) - stream.offset));
}

void MeshTransfer::find_piece(Stream& stream) const {
  while (stream.part < exchange_->parts().size() && stream.offset >= chunk_bytes(stream.part)) {
    ++stream.part;
    stream.offset = 0;
  }
}

const char* MeshTransfer::out_data(const Peer& peer) const {
  const auto* base = static_cast<const char*>(exchange_->parts()[peer.to.part].full.const_data_ptr());
  return base + peer.place * chunk_bytes(peer.to.part) + peer.to.offset;
}

char* MeshTransfer::in_data(const Peer& peer) const {
  auto* base = static_cast<char*>(exchange_->parts()[peer.from.part].shard.mutable_data_ptr());
  return base + peer.place * chunk_bytes(peer.from.part) + peer.from.offset;
}

void MeshTransfer::copy_own() const {
  for (size_t part = 0; part < exchange_->parts().size(); ++part) {
    const auto bytes = chunk_bytes(part);
    const auto* from = static_cast<const char*>(exchange_->parts()[part].full.const_data_ptr());
    auto* to = static_cast<char*>(exchange_->parts()[part].shard.mutable_data_ptr());
    const auto at = context_->members.place() * bytes;
    if (bytes > 0) std::memcpy(to + at, from + at, static_cast<size_t>(bytes));
  }
}

// --- sending ---

void MeshTransfer::send() {
  size_t under_way = 0;
  for (Peer& peer : peers_) {
    while (!peer.send_blocked && !peer.lost && !complete(peer.to) && send_some(peer)) {
    }
    if (!complete(peer.to) && ++under_way == width_) return;
  }
}

// Sends as much of the current frame as the socket takes; false when there is no room.
bool MeshTransfer::send_some(Peer& peer) {
  if (!peer.out.begun()) {
    const char* content = out_data(peer);
    const FrameHeader header = make_header(FrameType::kData, 0, context_->sequence, signature_,
                                           piece_bytes(peer.to), context_->check);
    peer.out.begin(header, content, context_->check);
  }
  const size_t bytes = piece_bytes(peer.to);
  const Flow flow = peer.out.send(peer.fd);
  peer.send_blocked = flow != Flow::kDone;
  if (flow == Flow::kLost) peer.lost = true;
  if (flow == Flow::kLost || flow == Flow::kBlocked) return false;
  progressed(peer);
  if (flow == Flow::kSome) return false;
  context_->host.progress(peer.rank).note_sent(static_cast<int64_t>(bytes));
  peer.to.offset += kPiece;
  find_piece(peer.to);
  return true;
}

// --- receiving ---

// Sleeps until the rest of the frame has come. Only the first header of an exchange is looked at on its own:
// a peer that is in another collective may never send as much.
void MeshTransfer::want(Peer& peer) {
  const size_t moved = peer.in.moved();
  const bool first = !peer.came && moved < sizeof(FrameHeader);
  const size_t whole = first ? sizeof(FrameHeader) : frame_bytes(piece_bytes(peer.from));
  const size_t bytes = peer.lost ? 1 : whole - moved;
  if (bytes == peer.low_water) return;
  peer.low_water = bytes;
  set_low_water(peer.fd, bytes);
}

void MeshTransfer::receive_some(Peer& peer) {
  const size_t bytes = piece_bytes(peer.from);
  char* content = bytes > 0 ? in_data(peer) : nullptr;
  Flow flow = peer.in.receive(peer.fd, content, bytes);
  if (flow == Flow::kBlocked) return;
  if (flow == Flow::kLost) blame_lost(peer.rank, errno == 0 ? complaint::closed() : complaint::lost(errno));
  while (peer.in.header_is_new() && is_remark(peer.in.header())) flow = hear_remark(peer, content);
  if (peer.in.moved() == 0) return;
  if (peer.in.header_is_new()) check_header(peer);
  progressed(peer);
  if (flow != Flow::kDone) return;
  if (content_check(content, bytes, context_->check) != peer.in.check()) {
    blame({peer.rank}, complaint::damaged());
  }
  peer.in.next();
  context_->host.progress(peer.rank).note_received(static_cast<int64_t>(bytes));
  peer.from.offset += kPiece;
  find_piece(peer.from);
}

// The peer is not in this exchange, and says for whom it waits elsewhere.
Flow MeshTransfer::hear_remark(Peer& peer, char* content) {
  const FrameHeader remark = peer.in.header();
  if (!valid(remark, context_->ranks, context_->check)) blame({peer.rank}, complaint::corrupt());
  const Flow flow = peer.in.take_remark(peer.fd, content, context_->check);
  peer.low_water = 1;  // which reading it has set
  if (flow == Flow::kLost) blame({peer.rank}, complaint::damaged());
  if (remark.blamed != context_->members.rank()) peer.waits_for = remark.blamed;
  return flow;
}

void MeshTransfer::check_header(Peer& peer) {
  const FrameHeader& header = peer.in.header();
  if (!valid(header, context_->ranks, context_->check)) blame({peer.rank}, complaint::corrupt());
  if (header.type == FrameType::kFailure) throw Failure(text_begun(peer), {peer.rank, header.blamed});
  if (header.type == FrameType::kLeft) blame({peer.rank}, complaint::left(peer.rank, text_begun(peer)));
  if (header.type != FrameType::kData || header.sequence != context_->sequence ||
      header.signature != signature_ || header.bytes != piece_bytes(peer.from))
    blame({peer.rank}, complaint::elsewhere());
  peer.came = true;
  peer.waits_for = peer.rank;
}

std::string MeshTransfer::text_begun(const Peer& peer) const {
  const char* content = complete(peer.from) ? nullptr : in_data(peer);
  return read_text(peer.fd, peer.in.begun(content), peer.in.header(), context_->check);
}

// --- waiting ---

bool MeshTransfer::finished() const {
  return std::all_of(peers_.begin(), peers_.end(),
                     [this](const Peer& peer) { return complete(peer.to) && complete(peer.from); });
}

void MeshTransfer::progressed(Peer& peer) {
  progress_ = peer.heard = Clock::now();
  if (!held_up_) return;
  held_up_ = false;
  context_->host.held_up(context_->members.rank());
}

void MeshTransfer::tell_held_up() {
  std::vector<int> culprits;
  for (const Peer& peer : peers_) {
    const bool waits = !complete(peer.from) || !complete(peer.to);
    if (waits && std::find(culprits.begin(), culprits.end(), peer.waits_for) == culprits.end())
      culprits.push_back(peer.waits_for);
  }
  if (culprits.size() != 1) return;
  held_up_ = true;
  if (const auto news = context_->host.held_up(culprits.front())) throw Failure(*news);
}

void MeshTransfer::wait_for_network() {
  size_t under_way = 0;
  for (size_t i = 0; i < peers_.size(); ++i) {
    Peer& peer = peers_[i];
    const bool sending = !complete(peer.to) && under_way++ < width_;
    const bool receiving = !complete(peer.from) || peer.lost;
    short events = 0;
    if (receiving) events |= POLLIN;
    if (sending && !peer.lost) events |= POLLOUT;
    if (!complete(peer.to) && !receiving) events |= POLLRDHUP;  // it leaves before it has taken all
    if (receiving) want(peer);
    entries_[i] = {events != 0 ? peer.fd : -1, events, 0};
  }
  entries_.back() = {context_->wake_fd, POLLIN, 0};
  const auto patience = std::min<int64_t>(context_->timeout.count() / 8, 1000);
  const int count = ::poll(entries_.data(), entries_.size(), static_cast<int>(patience) + 1);
  if (count < 0 && errno != EINTR)
    blame({context_->members.rank()}, std::string("could not poll: ") + std::strerror(errno));
  if (count > 0 && entries_.back().revents != 0) {
    if (const auto why = context_->host.ending()) throw Failure(*why);
  }
  for (size_t i = 0; i < peers_.size() && count > 0; ++i) {
    const pollfd& entry = entries_[i];
    if ((entry.events & POLLOUT) != 0 && (entry.revents & ~POLLIN) != 0) peers_[i].send_blocked = false;
    if ((entry.events & POLLIN) != 0 && (entry.revents & ~POLLOUT) != 0) receive_some(peers_[i]);
    if ((entry.events & POLLRDHUP) != 0 && (entry.revents & ~POLLOUT) != 0) peers_[i].lost = true;
  }
  check_deadlines();
}

void MeshTransfer::check_deadlines() {
  const auto quiet = since(progress_);
  // A peer that takes nothing shall not be in the way of the others, who would not know why we are silent.
  if (quiet >= std::min(context_->timeout / 8, milliseconds(1000))) width_ = peers_.size();
  if (quiet < context_->timeout / 4) return;
  // See Note [Who speaks first].
  const auto absent = [this](const Peer& peer) { return !complete(peer.from) && !peer.came; };
  const bool several = std::count_if(peers_.begin(), peers_.end(), absent) > 1;
  std::vector<int> silent;
  milliseconds limit{0};
  for (const Peer& peer : peers_) {
    const auto own = context_->limit(several && absent(peer));
    const bool waits = !complete(peer.from) || !complete(peer.to);
    if (!waits || since(peer.heard) < own) continue;
    if (std::find(silent.begin(), silent.end(), peer.waits_for) == silent.end())
      silent.push_back(peer.waits_for);
    limit = std::max(limit, own);
  }
  if (!silent.empty()) blame(silent, complaint::silent(limit));
  tell_held_up();
}

// --- failing ---

void MeshTransfer::tell(FrameType type, const Failure& failure, const FrameCheck& check) {
  const auto begun = Clock::now();
  const auto is_blamed = [&failure](const Peer& peer) {
    return std::find(failure.blamed.begin(), failure.blamed.end(), peer.rank) != failure.blamed.end();
  };
  for (const bool to_blamed : {false, true}) {  // who is to blame may take nothing
    const auto whole = milliseconds(to_blamed ? 200 : 2000);
    for (Peer& peer : peers_) {
      if (is_blamed(peer) != to_blamed) continue;
      const auto patience = std::max(whole - since(begun), milliseconds(0));
      // The frame that is under way is finished; its content no longer matters.
      if (!peer.lost && peer.out.finish(peer.fd, patience))
        push_text(peer.fd, type, failure.blamed.back(), failure.what(), check, patience);
      ::shutdown(peer.fd, SHUT_WR);
    }
  }
}

void MeshTransfer::blame(const std::vector<int>& ranks, const std::string& what) const {
  throw make_failure(ranks, what, phase_name(exchange_->phase()), exchange_->label(),
                     context_->members.rank());
}

void MeshTransfer::blame_lost(int rank, const std::string& what) const {
  throw Failure(context_->host.explain_loss(rank, what, *exchange_));
}

}  // namespace dear
