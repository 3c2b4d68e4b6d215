#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace dear {

// Note [Who may join]
// A rank's address and a nonce of 16 bytes stand in the process group's store. Who connects gets a challenge,
// and answers with a keyed hash (SipHash-2-4) of it, of the nonce, of its rank and of the lane; the listener
// answers likewise. So a port scanner, or who replays what it heard on the wire, takes nobody's place. Who
// can read the store and connect is one of us, unless DEAR_SHARED_KEY is set on every rank: then the hash is
// keyed with it, and so is the checksum of every frame. Nothing is encrypted, and a checksum is no signature:
// who can change packets on their way can change them so that it fits.

using Key = std::array<uint8_t, 16>;
using Nonce = std::array<uint8_t, 16>;

// SipHash-2-4 of `text`.
uint64_t keyed_hash(const Key& key, const std::string& text);

Nonce random_nonce();

// What the listener sends first.
struct Challenge {
  uint64_t magic;
  Nonce challenge;
};

// The caller's answer, which challenges the listener in turn.
struct Hello {
  uint64_t magic;
  int32_t rank;
  int32_t world;
  Nonce challenge;
  uint64_t tag;
};

// The listener's answer.
struct Welcome {
  uint64_t magic;
  uint64_t tag;
};

constexpr uint64_t kHelloMagic = 0x3252414544ull;  // "DEAR2"

// The tag of a hello ("hello") or welcome ("welcome") that answers `challenge`.
uint64_t hello_tag(const Key& key, const char* role, const std::string& lane, const Nonce& nonce,
                   const Nonce& challenge, int rank, int world);

}  // namespace dear
