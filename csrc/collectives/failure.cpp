#include "collectives/failure.h"

#include <cstdint>
#include <cstring>

namespace dear {
namespace {

// The length of the UTF-8 sequence at the beginning of `text`, 0 where there is none that is valid.
size_t sequence_length(const unsigned char* text, size_t size) {
  const unsigned char lead = text[0];
  if (lead >= 0x20 && lead < 0x7f) return 1;
  const size_t length = lead >= 0xc2 && lead < 0xe0   ? 2
                        : (lead & 0xf0) == 0xe0       ? 3
                        : lead >= 0xf0 && lead < 0xf5 ? 4
                                                      : 0;
  if (length == 0 || length > size) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((text[i] & 0xc0) != 0x80) return 0;
  }
  // Overlong forms, surrogates, and what lies beyond Unicode.
  if (lead == 0xe0 && text[1] < 0xa0) return 0;
  if (lead == 0xed && text[1] > 0x9f) return 0;
  if (lead == 0xf0 && text[1] < 0x90) return 0;
  if (lead == 0xf4 && text[1] > 0x8f) return 0;
  return length;
}

}  // namespace

Failure make_failure(const std::vector<int>& ranks, const std::string& what, const char* phase,
                     const std::string& label, int seen_by) {
  std::string who = "Rank " + std::to_string(ranks.front());
  for (size_t i = 1; i < ranks.size(); ++i) who += " and rank " + std::to_string(ranks[i]);
  return Failure(who + " " + what + " during the " + phase + " of " + label + ", as rank " +
                     std::to_string(seen_by) + " saw it.",
                 ranks);
}

std::string sanitised(const std::string& text) {
  std::string clean;
  const auto* bytes = reinterpret_cast<const unsigned char*>(text.data());
  for (size_t at = 0; at < text.size();) {
    const size_t length = sequence_length(bytes + at, text.size() - at);
    length == 0 ? clean.append(1, '?') : clean.append(text, at, length);
    at += length == 0 ? 1 : length;
  }
  return clean;
}

namespace complaint {

std::string closed() {
  return "closed its connection (its process has ended, or the network between the two is cut)";
}
std::string apart() {
  return "lost a connection between them, while others stand (suspect the network between their hosts)";
}
std::string alone() {
  return "lost its connections to all other ranks at once (the network of its host is cut, or all of them "
         "have ended)";
}
std::string lost(int error) { return std::string("lost its connection (") + std::strerror(error) + ")"; }
std::string corrupt() { return "sent bytes that are not this library's: the stream is corrupt"; }
std::string damaged() {
  return "sent bytes that were damaged on the way (their checksum differs: suspect a network card, "
         "a switch or memory)";
}
std::string elsewhere() {
  return "is in another collective, or in one of other sizes or dtypes (every rank must make the same calls "
         "in the same order)";
}
std::string silent(std::chrono::milliseconds timeout) {
  return "sent or took nothing for " + std::to_string(timeout.count()) +
         " ms (it has stalled, or is not in this collective)";
}
std::string left(int rank, const std::string& reason) {
  if (reason.empty()) return "left (its engine was detached or dropped, or its process ended)";
  std::string why = reason.back() == '.' ? reason.substr(0, reason.size() - 1) : reason;
  const std::string name = "Rank " + std::to_string(rank) + " ";
  return why.rfind(name, 0) == 0 ? why.substr(name.size()) : "left (" + why + ")";
}

}  // namespace complaint
}  // namespace dear
