#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <string>
#include <vector>

#include "collectives/hello.h"

namespace dear {

// A socket's address.
struct Address {
  sockaddr_storage storage{};
  socklen_t length = 0;
  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
};

// `host` is numeric. Throws one sentence when it is not understood.
Address parse_address(const std::string& host, const std::string& port);

// What a rank puts into the store, as text: where it listens, and what must agree.
struct Published {
  std::string host;
  std::string port;
  Nonce nonce{};
  bool checked = false;  // contents are checked
  bool keyed = false;    // there is a DEAR_SHARED_KEY

  std::vector<uint8_t> encoded() const;
  // Of rank `rank`. Throws one sentence when it is not understood.
  static Published decoded(const std::vector<uint8_t>& bytes, int rank);
};

}  // namespace dear
