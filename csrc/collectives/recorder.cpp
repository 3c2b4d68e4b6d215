#include "collectives/recorder.h"

#include <chrono>
#include <cstdio>
#include <fstream>
#include <sstream>

#include "collectives/clock.h"

namespace dear {
namespace {

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof(escape), "\\u%04x", c);
      out += escape;
    } else {
      out += c;
    }
  }
  return out + '"';
}

void write(std::ostream& out, const ExchangeRecord& exchange) {
  out << "{\"sequence\": " << exchange.sequence << ", \"phase\": " << quoted(exchange.phase)
      << ", \"label\": " << quoted(exchange.label) << ", \"bytes\": " << exchange.bytes
      << ", \"start_ns\": " << exchange.start_ns << ", \"end_ns\": " << exchange.end_ns << "}";
}

template <typename Items, typename Write>
void write_list(std::ostream& out, const Items& items, Write write_one) {
  out << "[";
  bool first = true;
  for (const auto& item : items) {
    if (!first) out << ", ";
    first = false;
    write_one(item);
  }
  out << "]";
}

void write(std::ostream& out, const LaneRecord& lane) {
  const auto exchange = [&out](const ExchangeRecord& record) { write(out, record); };
  out << "{\"name\": " << quoted(lane.name) << ", \"state\": " << quoted(lane.state) << ", \"current\": ";
  lane.state == "idle" ? void(out << "null") : exchange(lane.current);
  out << ", \"peers\": ";
  write_list(out, lane.peers, [&out](const LaneRecord::Peer& peer) {
    out << "{\"rank\": " << peer.rank << ", \"sent\": " << peer.sent << ", \"received\": " << peer.received
        << ", \"moved_ns\": " << peer.moved_ns << "}";
  });
  out << ",\n    \"queued\": ";
  write_list(out, lane.queued, exchange);
  out << ",\n    \"ended\": ";
  write_list(out, lane.ended, exchange);
  out << "}";
}

}  // namespace

void PeerProgress::begin() {
  sent = received = 0;
  moved_ns = now_ns();
}

void PeerProgress::note_sent(int64_t bytes) {
  sent.fetch_add(bytes, std::memory_order_relaxed);
  moved_ns.store(now_ns(), std::memory_order_relaxed);
}

void PeerProgress::note_received(int64_t bytes) {
  received.fetch_add(bytes, std::memory_order_relaxed);
  moved_ns.store(now_ns(), std::memory_order_relaxed);
}

void write_record(const std::string& path, int rank, int world, const std::string& error,
                  const std::vector<LaneRecord>& lanes) {
  std::ofstream out(path + "." + std::to_string(rank), std::ios::trunc);
  const auto unix_ns = std::chrono::duration_cast<std::chrono::nanoseconds>(
                           std::chrono::system_clock::now().time_since_epoch())
                           .count();
  out << "{\"rank\": " << rank << ", \"world\": " << world << ", \"error\": " << quoted(error)
      << ",\n \"unix_ns\": " << unix_ns << ", \"now_ns\": " << now_ns() << ",\n \"lanes\": ";
  write_list(out, lanes, [&out](const LaneRecord& lane) {
    out << "\n   ";
    write(out, lane);
  });
  out << "}\n";
}

}  // namespace dear
