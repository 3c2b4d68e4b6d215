#include "collectives/mesh_transfer.h"

#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace dear {

using std::chrono::milliseconds;

namespace {

constexpr int64_t kPiece = 256 << 10;  // bytes; what must be finished before news can be sent

// A failure, and the ranks to blame. They travel in the exception: GCC 12 loses what a function stores and
// then throws (a fault of -fipa-modref).
struct Failure : std::runtime_error {
  Failure(const std::string& what, std::vector<int> ranks)
      : std::runtime_error(what), blamed(std::move(ranks)) {}
  std::vector<int> blamed;
};

milliseconds since(std::chrono::steady_clock::time_point then) {
  return std::chrono::duration_cast<milliseconds>(std::chrono::steady_clock::now() - then);
}

}  // namespace

MeshTransfer::MeshTransfer(const MeshLinks& links, int rank, int world) : links_(links) {
  for (int distance = 1; distance < world; ++distance) {
    const int peer = (rank + distance) % world;
    peers_.push_back({peer, links.to(peer), {}, {}, false, false, 0, {}});
  }
  entries_.resize(peers_.size() + 1);
}

void MeshTransfer::run(const Exchange& exchange, const TransferContext& context) {
  exchange_ = &exchange;
  context_ = &context;
  signature_ = exchange.signature();
  width_ = 1;
  progress_ = Clock::now();
  for (Peer& peer : peers_) peer = {peer.rank, peer.fd, {}, {}, false, false, 0, progress_};
  for (Peer& peer : peers_) {
    next_piece(peer.out);
    next_piece(peer.in);
  }
  try {
    send();
    copy_own();
    while (!finished()) {
      wait_for_network();
      send();
    }
  } catch (const Failure& failure) {
    tell_peers(failure.what(), failure.blamed);
    links_.shut_down();
    throw;
  }
}

// --- pieces ---

int64_t MeshTransfer::chunk_bytes(size_t part) const {
  return static_cast<int64_t>(exchange_->parts()[part].full.nbytes()) / context_->world;
}

size_t MeshTransfer::piece_bytes(const Stream& stream) const {
  if (stream.part == exchange_->parts().size()) return 0;
  return static_cast<size_t>(std::min(kPiece, chunk_bytes(stream.part) - stream.offset));
}

// Goes on behind the piece that has moved, or to the first one.
void MeshTransfer::next_piece(Stream& stream) const {
  if (stream.moved > 0) stream.offset += kPiece;
  stream.moved = 0;
  while (stream.part < exchange_->parts().size() && stream.offset >= chunk_bytes(stream.part)) {
    ++stream.part;
    stream.offset = 0;
  }
}

const char* MeshTransfer::out_data(const Peer& peer) const {
  const auto* base = static_cast<const char*>(exchange_->parts()[peer.out.part].full.const_data_ptr());
  return base + peer.rank * chunk_bytes(peer.out.part) + peer.out.offset;
}

char* MeshTransfer::in_data(const Peer& peer) const {
  auto* base = static_cast<char*>(exchange_->parts()[peer.in.part].shard.mutable_data_ptr());
  return base + peer.rank * chunk_bytes(peer.in.part) + peer.in.offset;
}

void MeshTransfer::copy_own() const {
  for (size_t part = 0; part < exchange_->parts().size(); ++part) {
    const auto bytes = chunk_bytes(part);
    const auto* from = static_cast<const char*>(exchange_->parts()[part].full.const_data_ptr());
    auto* to = static_cast<char*>(exchange_->parts()[part].shard.mutable_data_ptr());
    const auto at = context_->rank * bytes;
    if (bytes > 0) std::memcpy(to + at, from + at, static_cast<size_t>(bytes));
  }
}

// --- sending ---

void MeshTransfer::send() {
  size_t under_way = 0;
  for (Peer& peer : peers_) {
    while (!peer.send_blocked && !peer.lost && !complete(peer.out) && send_some(peer)) {
    }
    if (!complete(peer.out) && ++under_way == width_) return;
  }
}

// Sends as much of the current frame as the socket takes; false when there is no room.
bool MeshTransfer::send_some(Peer& peer) {
  Stream& out = peer.out;
  const size_t bytes = piece_bytes(out);
  if (out.moved == 0) out.header = {kMagic, FrameType::kData, 0, context_->sequence, signature_, bytes};
  iovec blocks[2];
  const int count = frame_blocks(out.header, const_cast<char*>(out_data(peer)), bytes, out.moved, blocks);
  msghdr message{};
  message.msg_iov = blocks;
  message.msg_iovlen = static_cast<size_t>(count);
  const ssize_t put = ::sendmsg(peer.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  if (put < 0) {
    if (errno == EINTR) return true;
    if (errno != EAGAIN) peer.lost = true;
    peer.send_blocked = true;
    return false;
  }
  progressed(peer);
  out.moved += static_cast<size_t>(put);
  if (out.moved == sizeof(FrameHeader) + bytes) {
    next_piece(out);
  } else {
    peer.send_blocked = true;
  }
  return true;
}

// --- receiving ---

// Sleeps until the rest of the frame has come. Only the first header of an exchange is looked at on its own:
// a peer that is in another collective may never send as much.
void MeshTransfer::want(Peer& peer) {
  const Stream& in = peer.in;
  const bool first = in.part == 0 && in.offset == 0 && in.moved < sizeof(FrameHeader);
  const size_t bytes = peer.lost ? 1 : sizeof(FrameHeader) + (first ? 0 : piece_bytes(in)) - in.moved;
  if (bytes == peer.low_water) return;
  peer.low_water = bytes;
  set_low_water(peer.fd, bytes);
}

void MeshTransfer::receive_some(Peer& peer) {
  Stream& in = peer.in;
  const size_t before = in.moved;
  const size_t bytes = piece_bytes(in);
  iovec blocks[2];
  const int count = frame_blocks(in.header, bytes > 0 ? in_data(peer) : nullptr, bytes, before, blocks);
  msghdr message{};
  message.msg_iov = blocks;
  message.msg_iovlen = static_cast<size_t>(count);
  const ssize_t got = ::recvmsg(peer.fd, &message, MSG_DONTWAIT);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (got <= 0) blame({peer.rank}, got == 0 ? complaint::closed() : complaint::lost(errno));
  in.moved += static_cast<size_t>(got);
  if (before < sizeof(FrameHeader) && in.moved >= sizeof(FrameHeader)) check_header(peer);
  progressed(peer);
  if (in.moved == sizeof(FrameHeader) + bytes) next_piece(in);
}

void MeshTransfer::check_header(Peer& peer) {
  const FrameHeader& header = peer.in.header;
  const size_t expected = piece_bytes(peer.in);
  if (header.magic != kMagic) blame({peer.rank}, complaint::corrupt());
  if (header.type == FrameType::kFailure) {  // its words become ours; the first of them came with the header
    const size_t came = std::min<uint64_t>(header.bytes, peer.in.moved - sizeof(FrameHeader));
    std::string begun = came > 0 ? std::string(in_data(peer), came) : std::string();
    throw Failure(read_news(peer.fd, std::move(begun), header), {peer.rank, header.blamed});
  }
  if (header.sequence != context_->sequence || header.signature != signature_ || header.bytes != expected)
    blame({peer.rank}, complaint::elsewhere());
}

// --- waiting ---

bool MeshTransfer::finished() const {
  return std::all_of(peers_.begin(), peers_.end(),
                     [this](const Peer& peer) { return complete(peer.out) && complete(peer.in); });
}

void MeshTransfer::progressed(Peer& peer) { progress_ = peer.heard = Clock::now(); }

void MeshTransfer::wait_for_network() {
  size_t under_way = 0;
  for (size_t i = 0; i < peers_.size(); ++i) {
    Peer& peer = peers_[i];
    const bool sending = !complete(peer.out) && under_way++ < width_;
    const bool receiving = !complete(peer.in) || peer.lost;
    short events = 0;
    if (receiving) events |= POLLIN;
    if (sending && !peer.lost) events |= POLLOUT;
    if (receiving) want(peer);
    entries_[i] = {events != 0 ? peer.fd : -1, events, 0};
  }
  entries_.back() = {context_->wake_fd, POLLIN, 0};
  const auto patience = std::min<int64_t>(context_->timeout.count() / 8, 1000);
  const int count = ::poll(entries_.data(), entries_.size(), static_cast<int>(patience) + 1);
  if (count < 0 && errno != EINTR)
    blame({context_->rank}, std::string("could not poll: ") + std::strerror(errno));
  if (count > 0 && entries_.back().revents != 0) {
    const std::string reason = context_->abort_reason();
    if (!reason.empty()) throw Failure(reason, {context_->rank});
  }
  for (size_t i = 0; i < peers_.size() && count > 0; ++i) {
    const pollfd& entry = entries_[i];
    if ((entry.events & POLLOUT) != 0 && (entry.revents & ~POLLIN) != 0) peers_[i].send_blocked = false;
    if ((entry.events & POLLIN) != 0 && (entry.revents & ~POLLOUT) != 0) receive_some(peers_[i]);
  }
  check_deadlines();
}

void MeshTransfer::check_deadlines() {
  const auto quiet = since(progress_);
  // A peer that takes nothing shall not be in the way of the others, who would not know why we are silent.
  if (quiet >= std::min(context_->timeout / 8, milliseconds(1000))) width_ = peers_.size();
  if (quiet < context_->timeout / 4) return;
  std::vector<int> silent;
  for (const Peer& peer : peers_) {
    const bool waits = !complete(peer.in) || !complete(peer.out);
    if (waits && since(peer.heard) >= context_->timeout) silent.push_back(peer.rank);
  }
  if (!silent.empty()) blame(silent, complaint::silent(context_->timeout));
}

// --- failing ---

void MeshTransfer::tell_peers(const std::string& reason, const std::vector<int>& blamed) {
  const std::string text = reason.substr(0, kLongestNews);
  const FrameHeader header{
      kMagic,     FrameType::kFailure, static_cast<uint16_t>(blamed.back()), context_->sequence,
      signature_, text.size()};
  std::vector<char> frame(sizeof(header) + text.size());
  std::memcpy(frame.data(), &header, sizeof(header));
  std::memcpy(frame.data() + sizeof(header), text.data(), text.size());
  const auto begun = Clock::now();
  for (const Peer& peer : peers_) {
    if (peer.lost || std::find(blamed.begin(), blamed.end(), peer.rank) != blamed.end()) continue;
    const auto patience = std::max(milliseconds(2000) - since(begun), milliseconds(0));
    const Stream& out = peer.out;
    if (out.moved > 0) {  // finish the frame that is under way; its content no longer matters
      iovec blocks[2];
      const int count = frame_blocks(const_cast<FrameHeader&>(out.header), const_cast<char*>(out_data(peer)),
                                     piece_bytes(out), out.moved, blocks);
      bool done = true;
      for (int i = 0; i < count && done; ++i)
        done = push(peer.fd, static_cast<const char*>(blocks[i].iov_base), blocks[i].iov_len, patience);
      if (!done) continue;
    }
    push(peer.fd, frame.data(), frame.size(), patience);
  }
}

void MeshTransfer::blame(const std::vector<int>& ranks, const std::string& what) const {
  std::string who = "Rank " + std::to_string(ranks.front());
  for (size_t i = 1; i < ranks.size(); ++i) who += " and rank " + std::to_string(ranks[i]);
  throw Failure(who + " " + what + " during the " + phase_name(exchange_->phase()) + " of " +
                    exchange_->label() + ", as rank " + std::to_string(context_->rank) + " saw it.",
                ranks);
}

}  // namespace dear
