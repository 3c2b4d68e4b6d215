#include "collectives/hello.h"

#include <cstring>
#include <random>

namespace dear {
namespace {

uint64_t rotated(uint64_t value, int bits) { return (value << bits) | (value >> (64 - bits)); }

struct SipState {
  uint64_t v0, v1, v2, v3;

  void round() {
    v0 += v1;
    v1 = rotated(v1, 13) ^ v0;
    v0 = rotated(v0, 32);
    v2 += v3;
    v3 = rotated(v3, 16) ^ v2;
    v0 += v3;
    v3 = rotated(v3, 21) ^ v0;
    v2 += v1;
    v1 = rotated(v1, 17) ^ v2;
    v2 = rotated(v2, 32);
  }

  void take(uint64_t word) {
    v3 ^= word;
    round();
    round();
    v0 ^= word;
  }
};

std::string bytes_of(const Nonce& nonce) { return {nonce.begin(), nonce.end()}; }

}  // namespace

uint64_t keyed_hash(const Key& key, const std::string& text) {
  uint64_t k[2];
  std::memcpy(k, key.data(), sizeof(k));
  SipState state{k[0] ^ 0x736f6d6570736575ull, k[1] ^ 0x646f72616e646f6dull, k[0] ^ 0x6c7967656e657261ull,
                 k[1] ^ 0x7465646279746573ull};
  size_t at = 0;
  for (; at + 8 <= text.size(); at += 8) {
    uint64_t word;
    std::memcpy(&word, text.data() + at, sizeof(word));
    state.take(word);
  }
  uint64_t last = static_cast<uint64_t>(text.size()) << 56;
  for (size_t i = 0; at + i < text.size(); ++i) {
    last |= static_cast<uint64_t>(static_cast<uint8_t>(text[at + i])) << (8 * i);
  }
  state.take(last);
  state.v2 ^= 0xff;
  for (int i = 0; i < 4; ++i) state.round();
  return state.v0 ^ state.v1 ^ state.v2 ^ state.v3;
}

Nonce random_nonce() {
  std::random_device device;
  Nonce nonce;
  for (size_t at = 0; at < nonce.size(); at += 4) {
    const uint32_t word = device();
    std::memcpy(nonce.data() + at, &word, sizeof(word));
  }
  return nonce;
}

uint64_t hello_tag(const Key& key, const char* role, const std::string& lane, const Nonce& nonce,
                   const Nonce& challenge, int rank, int world) {
  return keyed_hash(key, std::string(role) + '\n' + bytes_of(nonce) + bytes_of(challenge) +
                             std::to_string(rank) + '/' + std::to_string(world) + '/' + lane);
}

}  // namespace dear
