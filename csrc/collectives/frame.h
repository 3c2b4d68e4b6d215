#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>

struct iovec;

namespace dear {

// What travels on a lane's connections: a header, and as many bytes as it says.
//
// Frames are sent only when their whole content is at hand, so that news never has to wait inside a frame
// behind data that does not come.
enum class FrameType : uint16_t {
  kData = 1,
  kWaiting = 2,  // ring only: the sender has nothing to send, since it waits for `blamed`
  kFailure = 3,  // the sender has failed: the content is one sentence, and it hangs up behind it
};

struct FrameHeader {
  uint32_t magic;
  FrameType type;
  uint16_t blamed;  // a rank
  uint32_t sequence;
  uint32_t signature;
  uint64_t bytes;
};

constexpr uint32_t kMagic = 0x52414544;  // "DEAR"
constexpr size_t kLongestNews = 1024;

// What is left of a frame of `bytes` behind its first `moved`, the header included: one or two blocks;
// returns how many.
int frame_blocks(FrameHeader& header, char* content, size_t bytes, size_t moved, iovec* blocks);

// Writes all of it to a non-blocking socket, or gives up after `patience` and returns false.
bool push(int fd, const char* data, size_t size, std::chrono::milliseconds patience);

// Reads the rest of a failure's sentence, of which `text` came with the header; gives up after a second.
std::string read_news(int fd, std::string text, const FrameHeader& header);

// Sets how many bytes must have arrived before poll() reports the socket readable (a hang-up it reports at
// once).
void set_low_water(int fd, size_t bytes);

// What several callers have to say of a neighbour, each a predicate of "Rank 3 ...".
namespace complaint {
std::string closed();
std::string lost(int error);
std::string corrupt();
std::string elsewhere();
std::string silent(std::chrono::milliseconds timeout);
}  // namespace complaint

}  // namespace dear
