#include "collectives/frame.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "collectives/checksum.h"
#include "collectives/failure.h"

namespace dear {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// What is left of a frame of `bytes` behind its first `moved`, as a message for sendmsg() or recvmsg().
struct Rest {
  Rest(FrameHeader& header, char* content, size_t bytes, size_t moved) {
    message.msg_iov = blocks;
    if (moved >= sizeof(header)) {
      const size_t done = moved - sizeof(header);
      blocks[0] = {content + done, bytes - done};
      message.msg_iovlen = 1;
    } else {
      blocks[0] = {reinterpret_cast<char*>(&header) + moved, sizeof(header) - moved};
      blocks[1] = {content, bytes};
      message.msg_iovlen = 2;
    }
  }
  iovec blocks[2];
  msghdr message{};
};

// Reads what is on its way, for a second at most; returns how much came.
size_t read_rest(int fd, char* data, size_t size) {
  size_t have = 0;
  set_low_water(fd, 1);
  const auto deadline = Clock::now() + milliseconds(1000);
  while (have < size && Clock::now() < deadline) {
    const ssize_t got = ::recv(fd, data + have, size - have, MSG_DONTWAIT);
    if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) break;
    if (got > 0) {
      have += static_cast<size_t>(got);
      continue;
    }
    pollfd entry{fd, POLLIN, 0};
    ::poll(&entry, 1, 100);
  }
  return have;
}

}  // namespace

uint32_t content_check(const void* content, size_t bytes, const FrameCheck& check) {
  return content_check(content, bytes, check, check.seed);
}

uint32_t content_check(const void* content, size_t bytes, const FrameCheck& check, uint32_t before) {
  return check.contents ? checksum(content, bytes, before) : 0;
}

FrameHeader make_header(FrameType type, int blamed, uint32_t sequence, uint32_t signature, size_t bytes,
                        uint32_t content, const FrameCheck& check) {
  FrameHeader header{kMagic, type, static_cast<uint16_t>(blamed), sequence, signature, bytes, content, 0};
  header.header_check = checksum(&header, offsetof(FrameHeader, header_check), check.seed);
  return header;
}

bool valid(const FrameHeader& header, int world, const FrameCheck& check) {
  return header.magic == kMagic &&
         header.header_check == checksum(&header, offsetof(FrameHeader, header_check), check.seed) &&
         header.type >= FrameType::kData && header.type <= FrameType::kLeft && header.blamed < world;
}

bool intact(const FrameHeader& header, const void* content, const FrameCheck& check) {
  return header.content_check == content_check(content, header.bytes, check);
}

void OutFrame::begin(const FrameHeader& header, const char* content) {
  header_ = header;
  content_ = content;
  moved_ = 0;
  begun_ = true;
}

Flow OutFrame::send(int fd) {
  const size_t bytes = header_.bytes;
  Rest rest(header_, const_cast<char*>(content_), bytes, moved_);
  ssize_t put;
  do {
    put = ::sendmsg(fd, &rest.message, MSG_NOSIGNAL | MSG_DONTWAIT);
  } while (put < 0 && errno == EINTR);
  if (put < 0) return errno == EAGAIN ? Flow::kBlocked : Flow::kLost;
  moved_ += static_cast<size_t>(put);
  if (moved_ < sizeof(FrameHeader) + bytes) return Flow::kSome;
  begun_ = false;
  return Flow::kDone;
}

bool OutFrame::finish(int fd, milliseconds patience) {
  if (!under_way()) return true;
  const size_t bytes = header_.bytes;
  const Rest rest(header_, const_cast<char*>(content_), bytes, moved_);
  begun_ = false;
  for (size_t i = 0; i < rest.message.msg_iovlen; ++i) {
    const iovec& block = rest.blocks[i];
    if (!push(fd, static_cast<const char*>(block.iov_base), block.iov_len, patience)) return false;
  }
  return true;
}

Flow InFrame::receive(int fd, char* content, size_t bytes) {
  Rest rest(header_, content, bytes, moved_);
  header_is_new_ = false;
  const ssize_t got = ::recvmsg(fd, &rest.message, MSG_DONTWAIT);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return Flow::kBlocked;
  if (got == 0) errno = 0;
  if (got <= 0) return Flow::kLost;
  header_is_new_ = moved_ < sizeof(FrameHeader) && moved_ + static_cast<size_t>(got) >= sizeof(FrameHeader);
  moved_ += static_cast<size_t>(got);
  return moved_ == sizeof(FrameHeader) + bytes ? Flow::kDone : Flow::kSome;
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

bool push_text(int fd, FrameType type, int blamed, const std::string& text, const FrameCheck& check,
               milliseconds patience) {
  const size_t length = std::min(text.size(), kLongestNews);
  std::string frame(sizeof(FrameHeader), '\0');
  const FrameHeader header =
      make_header(type, blamed, 0, 0, length, content_check(text.data(), length, check), check);
  std::memcpy(frame.data(), &header, sizeof(header));
  frame.append(text, 0, length);
  return push(fd, frame.data(), frame.size(), patience);
}

std::string read_text(int fd, std::string begun, const FrameHeader& header, const FrameCheck& check) {
  const size_t length = std::min<uint64_t>(header.bytes, kLongestNews);
  std::string text = std::move(begun);
  const size_t have = std::min(length, text.size());
  text.resize(length);
  text.resize(have + read_rest(fd, text.data() + have, length - have));
  if (text.size() == header.bytes && intact(header, text.data(), check)) return sanitised(text);
  if (header.type == FrameType::kLeft) return "";
  return "Rank " + std::to_string(header.blamed) +
         " is to blame for a failure, of which the text was damaged.";
}

std::optional<Word> read_word(int fd, int world, const FrameCheck& check) {
  FrameHeader header{};
  const ssize_t got = ::recv(fd, &header, sizeof(header), MSG_DONTWAIT);
  if (got <= 0) return std::nullopt;
  const auto have = static_cast<size_t>(got);
  if (have + read_rest(fd, reinterpret_cast<char*>(&header) + have, sizeof(header) - have) < sizeof(header) ||
      !valid(header, world, check)) {
    return std::nullopt;
  }
  if (header.type != FrameType::kFailure && header.type != FrameType::kLeft) return std::nullopt;
  return Word{header.type, header.blamed, read_text(fd, "", header, check)};
}

bool hung_up(int fd) {
  char next;
  const ssize_t got = ::recv(fd, &next, 1, MSG_PEEK | MSG_DONTWAIT);
  return got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR);
}

void set_low_water(int fd, size_t bytes) {
  const int value = static_cast<int>(bytes);
  ::setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &value, sizeof(value));
}

}  // namespace dear
