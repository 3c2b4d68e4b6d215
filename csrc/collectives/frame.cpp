#include "collectives/frame.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace dear {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

int frame_blocks(FrameHeader& header, char* content, size_t bytes, size_t moved, iovec* blocks) {
  if (moved >= sizeof(header)) {
    const size_t done = moved - sizeof(header);
    blocks[0] = {content + done, bytes - done};
    return 1;
  }
  blocks[0] = {reinterpret_cast<char*>(&header) + moved, sizeof(header) - moved};
  blocks[1] = {content, bytes};
  return 2;
}

bool push(int fd, const char* data, size_t size, milliseconds patience) {
  const auto deadline = Clock::now() + patience;
  while (size > 0) {
    const ssize_t put = ::send(fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (put > 0) {
      data += put;
      size -= static_cast<size_t>(put);
      continue;
    }
    if (put < 0 && errno != EAGAIN && errno != EINTR) return false;
    pollfd entry{fd, POLLOUT, 0};
    const auto left = std::chrono::duration_cast<milliseconds>(deadline - Clock::now()).count();
    if (left <= 0 || ::poll(&entry, 1, static_cast<int>(left)) == 0) return false;
  }
  return true;
}

std::string read_news(int fd, std::string text, const FrameHeader& header) {
  const size_t length = std::min<uint64_t>(header.bytes, kLongestNews);
  text.resize(std::min(length, text.size()));
  char more[kLongestNews];
  set_low_water(fd, 1);
  const auto deadline = Clock::now() + milliseconds(1000);
  while (text.size() < length && Clock::now() < deadline) {
    const ssize_t got = ::recv(fd, more, length - text.size(), MSG_DONTWAIT);
    if (got == 0) break;
    if (got > 0) {
      text.append(more, static_cast<size_t>(got));
      continue;
    }
    pollfd entry{fd, POLLIN, 0};
    ::poll(&entry, 1, 100);
  }
  return text;
}

void set_low_water(int fd, size_t bytes) {
  const int value = static_cast<int>(bytes);
  ::setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &value, sizeof(value));
}

namespace complaint {

std::string closed() { return "closed its connection (its process has ended, or it has failed or detached)"; }
std::string lost(int error) { return std::string("lost its connection (") + std::strerror(error) + ")"; }
std::string corrupt() { return "sent bytes that are not this library's: the stream is corrupt"; }
std::string elsewhere() {
  return "is in another collective, or in one of other sizes or dtypes (every rank must make the same calls "
         "in the "
         "same order)";
}
std::string silent(milliseconds timeout) {
  return "sent or took nothing for " + std::to_string(timeout.count()) +
         " ms (it has stalled, or is not in this collective)";
}

}  // namespace complaint
}  // namespace dear
