#include "collectives/frame.h"

#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>

#include "collectives/checksum.h"
#include "collectives/failure.h"

namespace dear {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr size_t kSmall = 32 << 10;  // bytes: not worth a second system call

// What is left of a frame behind its first `moved` bytes, as a message for sendmsg() or recvmsg().
struct Rest {
  Rest(FrameHeader& header, char* content, size_t bytes, ContentCheck& check, size_t moved) {
    const iovec all[] = {{&header, sizeof(header)}, {content, bytes}, {&check, sizeof(check)}};
    message.msg_iov = blocks;
    for (const iovec& block : all) {
      const size_t done = std::min(moved, block.iov_len);
      moved -= done;
      if (done == block.iov_len) continue;
      blocks[message.msg_iovlen++] = {static_cast<char*>(block.iov_base) + done, block.iov_len - done};
    }
  }
  iovec blocks[3];
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

ContentCheck content_check(const void* content, size_t bytes, const FrameCheck& check) {
  return content_check(content, bytes, check, check.seed);
}

ContentCheck content_check(const void* content, size_t bytes, const FrameCheck& check, ContentCheck before) {
  return check.contents ? checksum(content, bytes, before) : 0;
}

FrameHeader make_header(FrameType type, int blamed, uint32_t sequence, uint32_t signature, size_t bytes,
                        const FrameCheck& check) {
  FrameHeader header{
      kMagic, type, static_cast<uint16_t>(blamed), sequence, signature, static_cast<uint32_t>(bytes), 0};
  header.header_check = checksum(&header, offsetof(FrameHeader, header_check), check.seed);
  return header;
}

std::vector<char> make_frame(const FrameHeader& header, const char* content, const FrameCheck& check) {
  std::vector<char> frame(frame_bytes(header.bytes));
  const ContentCheck sum = content_check(content, header.bytes, check);
  std::memcpy(frame.data(), &header, sizeof(header));
  std::copy(content, content + header.bytes, frame.begin() + sizeof(header));
  std::memcpy(frame.data() + frame.size() - sizeof(sum), &sum, sizeof(sum));
  return frame;
}

bool valid(const FrameHeader& header, int world, const FrameCheck& check) {
  return header.magic == kMagic &&
         header.header_check == checksum(&header, offsetof(FrameHeader, header_check), check.seed) &&
         header.type >= FrameType::kData && header.type <= FrameType::kLeft && header.blamed < world;
}

void OutFrame::begin(const FrameHeader& header, const char* content, const FrameCheck& check) {
  begin(header, content, check.contents ? check.seed : 0);
  how_ = check;
  checked_ = 0;
  if (!check.contents) checked_ = header.bytes;
  if (header.bytes <= kSmall) this->check(header.bytes);
}

void OutFrame::begin(const FrameHeader& header, const char* content, ContentCheck known) {
  header_ = header;
  content_ = content;
  check_ = known;
  checked_ = header.bytes;
  moved_ = 0;
  begun_ = true;
}

void OutFrame::check(size_t bytes) {
  if (bytes <= checked_) return;
  check_ = content_check(content_ + checked_, bytes - checked_, how_, check_);
  checked_ = bytes;
}

Flow OutFrame::send(int fd) {
  const size_t bytes = header_.bytes;
  Flow flow = Flow::kBlocked;
  do {  // a second time for a checksum that was not known at the first
    Rest rest(header_, const_cast<char*>(content_), bytes, check_, moved_);
    const bool more = !checked();
    if (more) --rest.message.msg_iovlen;
    ssize_t put;
    do {
      put = ::sendmsg(fd, &rest.message, MSG_NOSIGNAL | MSG_DONTWAIT | (more ? MSG_MORE : 0));
    } while (put < 0 && errno == EINTR);
    if (put < 0) return errno == EAGAIN ? flow : Flow::kLost;
    flow = Flow::kSome;
    moved_ += static_cast<size_t>(put);
    check(std::min(bytes, moved_ - std::min(moved_, sizeof(header_))));
  } while (moved_ == sizeof(header_) + bytes);
  if (moved_ < frame_bytes(bytes)) return flow;
  begun_ = false;
  return Flow::kDone;
}

bool OutFrame::finish(int fd, milliseconds patience) {
  if (!under_way()) return true;
  check(header_.bytes);
  const Rest rest(header_, const_cast<char*>(content_), header_.bytes, check_, moved_);
  begun_ = false;
  for (size_t i = 0; i < rest.message.msg_iovlen; ++i) {
    const iovec& block = rest.blocks[i];
    if (!push(fd, static_cast<const char*>(block.iov_base), block.iov_len, patience)) return false;
  }
  return true;
}

Flow InFrame::receive(int fd, char* content, size_t bytes) {
  expected_ = bytes;
  Rest rest(header_, content, bytes, check_, moved_);
  header_is_new_ = false;
  const ssize_t got = ::recvmsg(fd, &rest.message, MSG_DONTWAIT);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return Flow::kBlocked;
  if (got == 0) errno = 0;
  if (got <= 0) return Flow::kLost;
  header_is_new_ = moved_ < sizeof(FrameHeader) && moved_ + static_cast<size_t>(got) >= sizeof(FrameHeader);
  moved_ += static_cast<size_t>(got);
  return moved_ == frame_bytes(bytes) ? Flow::kDone : Flow::kSome;
}

Flow InFrame::take_remark(int fd, char* content, const FrameCheck& check) {
  std::string came = begun(content);
  const bool damaged = !read_text(fd, came, header_, check).empty();
  came.erase(0, std::min(came.size(), sizeof(ContentCheck)));
  moved_ = came.size();
  const size_t head = std::min(moved_, sizeof(header_));
  const size_t inside = std::min(moved_ - head, expected_);
  std::memcpy(static_cast<void*>(&header_), came.data(), head);
  if (inside > 0) std::memcpy(content, came.data() + head, inside);
  std::memcpy(&check_, came.data() + head + inside, moved_ - head - inside);
  header_is_new_ = head == sizeof(header_);
  if (damaged) return Flow::kLost;
  return moved_ == frame_bytes(expected_) ? Flow::kDone : Flow::kSome;
}

std::string InFrame::begun(const char* content) const {
  const size_t came = moved_ - std::min(moved_, sizeof(header_));
  const size_t inside = std::min(came, expected_);
  return std::string(content, inside) + std::string(reinterpret_cast<const char*>(&check_), came - inside);
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

bool push_remark(int fd, int blamed, const FrameCheck& check) {
  return push_text(fd, FrameType::kWaiting, blamed, "", check, milliseconds(200));
}

bool is_remark(const FrameHeader& header) {
  return header.type == FrameType::kWaiting && header.signature == 0 && header.bytes == 0;
}

void drop_remarks(int fd) {
  char frame[frame_bytes(0)];
  FrameHeader header{};
  while (::recv(fd, frame, sizeof(frame), MSG_PEEK | MSG_DONTWAIT) == sizeof(frame)) {
    std::memcpy(static_cast<void*>(&header), frame, sizeof(header));
    if (header.magic != kMagic || !is_remark(header)) return;
    if (::recv(fd, frame, sizeof(frame), MSG_DONTWAIT) != sizeof(frame)) return;
  }
}

bool push_text(int fd, FrameType type, int blamed, const std::string& text, const FrameCheck& check,
               milliseconds patience) {
  const size_t length = std::min(text.size(), kLongestNews);
  const FrameHeader header = make_header(type, blamed, 0, 0, length, check);
  const std::vector<char> frame = make_frame(header, text.data(), check);
  return push(fd, frame.data(), frame.size(), patience);
}

std::string read_text(int fd, std::string begun, const FrameHeader& header, const FrameCheck& check) {
  const size_t length = std::min<size_t>(header.bytes, kLongestNews);
  const size_t whole = length + sizeof(ContentCheck);
  std::string text = std::move(begun);
  const size_t have = std::min(whole, text.size());
  text.resize(whole);
  const bool complete =
      have + read_rest(fd, text.data() + have, whole - have) == whole && length == header.bytes;
  ContentCheck sum;
  std::memcpy(&sum, text.data() + length, sizeof(sum));
  text.resize(length);
  if (complete && content_check(text.data(), length, check) == sum) return sanitised(text);
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
  const bool known =
      header.type == FrameType::kFailure || header.type == FrameType::kLeft || is_remark(header);
  if (!known) return std::nullopt;
  return Word{header.type, header.blamed, read_text(fd, "", header, check)};
}

bool hung_up(int fd) {
  char next;
  const ssize_t got = ::recv(fd, &next, 1, MSG_PEEK | MSG_DONTWAIT);
  return got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR);
}

bool still_open(int fd) {
  pollfd entry{fd, POLLRDHUP, 0};
  return ::poll(&entry, 1, 0) == 0;
}

void await_delivery(const std::vector<int>& fds) {
  constexpr milliseconds kQuiet{1000};    // with one that takes nothing
  constexpr milliseconds kWhole{10'000};  // with one that takes little
  const auto begun = Clock::now();
  auto moved = begun;
  int before = 0;
  while (true) {
    int left = 0;
    for (const int fd : fds) {
      int bytes = 0;
      if (still_open(fd) && ::ioctl(fd, SIOCOUTQ, &bytes) == 0) left += bytes;
    }
    const auto now = Clock::now();
    if (left != before) moved = now;
    before = left;
    if (left == 0 || now - moved >= kQuiet || now - begun >= kWhole) return;
    std::this_thread::sleep_for(milliseconds(2));
  }
}

void set_low_water(int fd, size_t bytes) {
  const int value = static_cast<int>(bytes);
  ::setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &value, sizeof(value));
}

}  // namespace dear
