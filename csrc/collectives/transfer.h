#pragma once

#include <algorithm>
#include <chrono>
#include <optional>
#include <string>

#include "collectives/exchange.h"
#include "collectives/failure.h"
#include "collectives/frame.h"
#include "collectives/members.h"
#include "collectives/recorder.h"

namespace dear {

// What a transfer may ask of its lane, and tell it.
class TransferHost {
 public:
  virtual ~TransferHost() = default;
  // Why the lane is not wanted any more. To be asked when the wake-up descriptor is readable.
  virtual std::optional<Failure> ending() = 0;
  // Makes a failure known to the process's other lanes; returns what is to be told and thrown in its place.
  virtual Failure publish(const Failure& failure) = 0;
  // What to publish of a connection to `peer` that has ended without a word; see Peers::explain_loss().
  virtual Failure explain_loss(int peer, const std::string& what, const Exchange& exchange) = 0;
  // The transfer waits for rank `culprit`, or for nobody any more where that is this rank: the process's
  // other lanes say so. Returns what one of them has heard meanwhile. See Note [Who is to blame].
  virtual std::optional<Failure> held_up(int culprit) = 0;
  virtual PeerProgress& progress(int peer) = 0;
};

// Note [Who speaks first]
// A rank may end an exchange while a peer is still in it, held up by a third one that has stopped: what the
// third one owed the first had come. In the next exchange the first one sees the living peer and the stopped
// one silent alike, and its timeout may end before that of the peer, which knows better. So whoever may be
// behind is waited for somewhat longer:
//  - In a ring: the previous rank, until something of this exchange has come from it, and whomever it waits
//    for. Who is held up in the exchange before has got something there: what it passed on, without which
//    nobody could have ended it. So whoever sees the culprit itself speaks first.
//  - In a mesh: the peers from which nothing of this exchange has come, where there are several. A single one
//    waits for nobody, since all others are in this exchange, and have sent it all of the one before.

// What a transfer needs to know of the lane it runs in.
struct TransferContext {
  const Members& members;
  int ranks;  // of the process group, among which are those that frames name
  std::chrono::milliseconds timeout;
  uint32_t sequence;  // of this exchange in its lane
  int wake_fd;        // readable when `host` has an ending
  FrameCheck check;
  TransferHost& host;

  // How long to wait for a peer before it is blamed. See Note [Who speaks first].
  std::chrono::milliseconds limit(bool may_be_behind) const {
    const auto longer = std::min(timeout / 8, std::chrono::milliseconds(10'000));
    return timeout + (may_be_behind ? longer : std::chrono::milliseconds(0));
  }
};

}  // namespace dear
