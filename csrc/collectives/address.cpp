#include "collectives/address.h"

#include <netdb.h>

#include <cstring>
#include <sstream>
#include <stdexcept>

namespace dear {
namespace {

std::string to_hex(const Nonce& nonce) {
  static const char* const kDigits = "0123456789abcdef";
  std::string text;
  for (const uint8_t byte : nonce) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

// False where `text` is no nonce.
bool from_hex(const std::string& text, Nonce* nonce) {
  if (text.size() != 2 * nonce->size() || text.find_first_not_of("0123456789abcdef") != std::string::npos)
    return false;
  for (size_t i = 0; i < nonce->size(); ++i)
    (*nonce)[i] = static_cast<uint8_t>(std::stoi(text.substr(2 * i, 2), nullptr, 16));
  return true;
}

}  // namespace

Address parse_address(const std::string& host, const std::string& port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
  addrinfo* list = nullptr;
  const int error = ::getaddrinfo(host.c_str(), port.c_str(), &hints, &list);
  if (error != 0) {
    throw std::runtime_error("The address '" + host + "' of a rank is not understood (" +
                             ::gai_strerror(error) +
                             "): set GLOO_SOCKET_IFNAME to an interface that `ip addr` lists.");
  }
  Address address;
  address.length = list->ai_addrlen;
  std::memcpy(&address.storage, list->ai_addr, list->ai_addrlen);
  ::freeaddrinfo(list);
  return address;
}

std::vector<uint8_t> Published::encoded() const {
  std::ostringstream out;
  out << "dear2 " << host << ' ' << port << ' ' << to_hex(nonce) << ' ' << checked << ' ' << keyed;
  const std::string text = out.str();
  return {text.begin(), text.end()};
}

Published Published::decoded(const std::vector<uint8_t>& bytes, int rank) {
  std::istringstream in(std::string(bytes.begin(), bytes.end()));
  std::string magic;
  std::string nonce;
  Published peer;
  in >> magic >> peer.host >> peer.port >> nonce >> peer.checked >> peer.keyed;
  if (!in || magic != "dear2" || !from_hex(nonce, &peer.nonce)) {
    throw std::runtime_error("Rank " + std::to_string(rank) +
                             " runs another version of this library: install the same one on every host.");
  }
  return peer;
}

}  // namespace dear
