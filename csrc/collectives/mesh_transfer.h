#pragma once

#include <poll.h>

#include "collectives/frame.h"
#include "collectives/links.h"
#include "collectives/transfer.h"

namespace dear {

// Moves all-to-alls, one at a time, over a mesh of connections.
//
// Note [One after another]
// Where every rank sends to all at once, each port is shared by as many streams as there are peers, never
// quite evenly, and links are idle once their faster streams have finished. So a rank sends to one peer at a
// time, rank r first to r + 1, then to r + 2: at any moment each port carries about one stream each way.
// Nobody waits for the others to get there: what comes is received, from whomever. For this, a socket holds
// little that is unsent (TCP_NOTSENT_LOWAT), or several streams would be in the sockets at once.
//
// Threads: the lane's only.
class MeshTransfer {
 public:
  // `links` outlives this.
  MeshTransfer(const MeshLinks& links, const Members& members);

  // Moves one exchange; returns when this rank's part is done. Throws a Failure that names the ranks to
  // blame, the phase and the fusion group; before that it publishes it and tells the peers. After a throw the
  // connections are of no further use.
  void run(const Exchange& exchange, const TransferContext& context);
  // Tells all peers, behind the frames that are under way, those to blame last; shows them that nothing more
  // will come.
  void tell(FrameType type, const Failure& failure, const FrameCheck& check);

 private:
  using Clock = std::chrono::steady_clock;

  // One direction of a connection: the piece whose turn it is.
  struct Stream {
    size_t part = 0;
    int64_t offset = 0;  // bytes, in the chunk of that part
  };

  struct Peer {
    int rank;
    int place;  // in the lane: which chunk is its own
    int fd;
    Stream to;
    Stream from;
    OutFrame out;
    InFrame in;
    bool send_blocked = false;
    bool lost = false;  // it takes nothing any more: what it sent before says why
    bool came = false;  // something of this exchange has
    size_t low_water = 0;
    Clock::time_point heard;  // when anything last moved, either way
    int waits_for;  // itself, or the rank that it waits for elsewhere, not being in this exchange yet
  };

  int64_t chunk_bytes(size_t part) const;
  // Of the stream's piece; 0 when all pieces have moved.
  size_t piece_bytes(const Stream& stream) const;
  bool complete(const Stream& stream) const { return piece_bytes(stream) == 0; }
  // Goes to the piece at `stream`, or to the first behind it that is one.
  void find_piece(Stream& stream) const;
  const char* out_data(const Peer& peer) const;
  char* in_data(const Peer& peer) const;
  void copy_own() const;

  void send();
  bool send_some(Peer& peer);
  void receive_some(Peer& peer);
  Flow hear_remark(Peer& peer, char* content);
  void check_header(Peer& peer);
  void want(Peer& peer);
  bool finished() const;
  void wait_for_network();
  void check_deadlines();
  void progressed(Peer& peer);
  // Tells the other lanes for whom this one waits, where it is one rank.
  void tell_held_up();

  // The text of a kFailure or kLeft frame, whose first bytes came with the header.
  std::string text_begun(const Peer& peer) const;
  [[noreturn]] void blame(const std::vector<int>& ranks, const std::string& what) const;
  // A peer is gone that gave no reason here.
  [[noreturn]] void blame_lost(int rank, const std::string& what) const;

  std::vector<Peer> peers_;      // in the order in which they are sent to
  std::vector<pollfd> entries_;  // of peers_, and the wake-up

  // Of the exchange under way.
  const Exchange* exchange_ = nullptr;
  const TransferContext* context_ = nullptr;
  uint32_t signature_ = 0;
  size_t width_ = 1;  // how many peers are sent to at a time
  Clock::time_point progress_;
  bool held_up_ = false;  // the other lanes were told so
};

}  // namespace dear
