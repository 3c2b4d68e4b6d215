#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace dear {

// What travels on a lane's connections: a header, as many bytes as it says, and their checksum.
//
// Note [The checksum comes last]
// Who sends a content that has not been touched for long takes its checksum after the kernel has copied it,
// from the cache. Before it, the checksum would wait for the memory.
//
// Frames are sent only when their whole content is at hand, so that news never has to wait inside a frame
// behind data that does not come. Integers have the machine's own byte order, which is little-endian wherever
// this library builds.
enum class FrameType : uint16_t {
  kData = 1,
  kWaiting = 2,  // the sender has nothing to send, since it waits for `blamed`: in a ring instead of data,
                 // and as long; or a remark, where the sender is not in this exchange yet
  kFailure = 3,  // the sender has failed: the content is one sentence, and the sender closes behind it
  kLeft = 4,     // the sender leaves: the content is its reason, maybe empty, and the sender closes behind it
};

struct FrameHeader {
  uint32_t magic;
  FrameType type;
  uint16_t blamed;  // a rank
  uint32_t sequence;
  uint32_t signature;
  uint32_t bytes;
  uint32_t header_check;  // of everything before it
};
static_assert(sizeof(FrameHeader) == 24);

// Of the content; 0 where contents are not checked.
using ContentCheck = uint32_t;

// A frame of a content of `bytes`.
constexpr size_t frame_bytes(size_t bytes) { return sizeof(FrameHeader) + bytes + sizeof(ContentCheck); }

constexpr uint32_t kMagic = 0x52414544;  // "DEAR"
constexpr size_t kLongestNews = 1024;

// How frames are guarded against damage. The same on all ranks of a lane.
struct FrameCheck {
  bool contents = true;
  uint32_t seed = 0;
};

// Of a content, or of its first bytes; or of bytes and those before them, of which it is `before`.
ContentCheck content_check(const void* content, size_t bytes, const FrameCheck& check);
ContentCheck content_check(const void* content, size_t bytes, const FrameCheck& check, ContentCheck before);

// A header whose check stands, of a content of `bytes`.
FrameHeader make_header(FrameType type, int blamed, uint32_t sequence, uint32_t signature, size_t bytes,
                        const FrameCheck& check);
// A frame in one piece.
std::vector<char> make_frame(const FrameHeader& header, const char* content, const FrameCheck& check);
// The header is one of this library's, undamaged, of a known type, and blames one of `world` ranks.
bool valid(const FrameHeader& header, int world, const FrameCheck& check);
// What became of an attempt to move something.
enum class Flow { kDone, kSome, kBlocked, kLost };

// The frame that is being sent in one direction of a connection.
class OutFrame {
 public:
  bool begun() const { return begun_; }
  // Some of it has left: the receiver waits for the rest.
  bool under_way() const { return begun_ && moved_ > 0; }
  // `content` stays where it is until the frame is done. Its checksum is taken while it is sent, or is
  // `known`.
  void begin(const FrameHeader& header, const char* content, const FrameCheck& check);
  void begin(const FrameHeader& header, const char* content, ContentCheck known);
  // Sends as much as the socket takes. kLost leaves the reason in errno.
  Flow send(int fd);
  // Writes what is left of a frame that is under way, or gives up after `patience`.
  bool finish(int fd, std::chrono::milliseconds patience);

 private:
  bool checked() const { return checked_ == header_.bytes; }
  // Takes the checksum of the content's first `bytes`.
  void check(size_t bytes);

  FrameHeader header_{};
  const char* content_ = nullptr;
  FrameCheck how_{};
  ContentCheck check_ = 0;  // of the content's first bytes, `checked_` of them
  size_t checked_ = 0;
  size_t moved_ = 0;  // bytes of the frame
  bool begun_ = false;
};

// The frame that is being received in one direction of a connection, which expects contents of `bytes`.
class InFrame {
 public:
  // Reads as much as has come. kDone: the whole frame has; kLost: errno, or 0 where the peer has hung up.
  Flow receive(int fd, char* content, size_t bytes);
  const FrameHeader& header() const { return header_; }
  // The last receive() brought the end of the header. Where the frame is not of the length expected, the rest
  // of what has come is the beginning of its content.
  bool header_is_new() const { return header_is_new_; }
  // What came with the content; it fits where the content is what was sent.
  ContentCheck check() const { return check_; }
  size_t moved() const { return moved_; }
  // What has come behind the header, of a frame of another length than expected.
  std::string begun(const char* content) const;
  void next() { moved_ = 0; }
  // The frame is a remark: takes it away. What came behind it begins the next frame. kLost: it is damaged.
  Flow take_remark(int fd, char* content, const FrameCheck& check);

 private:
  FrameHeader header_{};
  ContentCheck check_ = 0;
  size_t expected_ = 0;  // bytes of the content
  size_t moved_ = 0;     // bytes of the frame
  bool header_is_new_ = false;
};

// A frame without content that may come before any other on an idle connection: the sender waits for `blamed`
// in another exchange.
bool push_remark(int fd, int blamed, const FrameCheck& check);
bool is_remark(const FrameHeader& header);
// Takes away the remarks that nobody has read, on a connection on which no frame is under way.
void drop_remarks(int fd);

// Writes all of it to a non-blocking socket, or gives up after `patience` and returns false.
bool push(int fd, const char* data, size_t size, std::chrono::milliseconds patience);
// Writes a frame whose content is a text, as push() does.
bool push_text(int fd, FrameType type, int blamed, const std::string& text, const FrameCheck& check,
               std::chrono::milliseconds patience);

// The text of a kFailure or kLeft frame whose header has come, and behind it the bytes `begun`; gives up
// after a second. It is fit to be printed, whatever came.
std::string read_text(int fd, std::string begun, const FrameHeader& header, const FrameCheck& check);

// A kFailure or kLeft frame, or a remark.
struct Word {
  FrameType type;
  int blamed;
  std::string text;
};
// The one that has come on a connection on which nothing else does, if one has.
std::optional<Word> read_word(int fd, int world, const FrameCheck& check);

// Whether the other side has ended the connection and nothing of it is left to be read.
bool hung_up(int fd);

// Whether the other side may still send something. Disturbs nobody who reads.
bool still_open(int fd);

// Waits until the other sides' kernels have all that was sent on these connections, for as long as they take
// more of it. One that is closed while something on it is unread ends at once, and takes along what is still
// to be sent: the news of a failure behind data, say.
void await_delivery(const std::vector<int>& fds);

// Sets how many bytes must have arrived before poll() reports the socket readable (a hang-up it reports at
// once).
void set_low_water(int fd, size_t bytes);

}  // namespace dear
