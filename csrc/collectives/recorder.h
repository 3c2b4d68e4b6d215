#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace dear {

// What an exchange under way has moved to and from one peer.
struct PeerProgress {
  std::atomic<int64_t> sent{0};  // bytes of whole frames, without headers
  std::atomic<int64_t> received{0};
  std::atomic<int64_t> moved_ns{0};  // when the last of them did, or the exchange began; now_ns()'s clock

  void begin();
  void note_sent(int64_t bytes);
  void note_received(int64_t bytes);
};

// An exchange as the flight recorder shows it. Times in ns; 0 for what has not happened.
struct ExchangeRecord {
  uint32_t sequence = 0;
  std::string phase;
  std::string label;
  int64_t bytes = 0;
  int64_t start_ns = 0;
  int64_t end_ns = 0;
};

// What a lane was doing.
struct LaneRecord {
  struct Peer {
    int rank = 0;
    int64_t sent = 0;
    int64_t received = 0;
    int64_t moved_ns = 0;
  };
  std::string name;
  std::string state;       // "idle", "preparing" (waiting for what is to be sent), "moving", "failed"
  ExchangeRecord current;  // where the state is one of the latter three
  std::vector<Peer> peers;
  std::vector<ExchangeRecord> queued;
  std::vector<ExchangeRecord> ended;  // the last ones, oldest first
};

// Note [The flight recorder]
// Where DEAR_FLIGHT_RECORDER=path is set, a process whose lanes fail writes path.<rank> before it raises: a
// JSON object with the rank, the world size, the error, the time, and for each lane what it was doing. Of all
// ranks' files together one sees who was where. Written once for each group of lanes that fails.
void write_record(const std::string& path, int rank, int world, const std::string& error,
                  const std::vector<LaneRecord>& lanes);

}  // namespace dear
