#include "collectives/links.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

namespace dear {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kMeshUnsent = 128 << 10;  // bytes a mesh's socket holds before it counts as full

// A file descriptor that closes itself: set-up may throw at any line.
class Socket {
 public:
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Socket() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

struct Address {
  sockaddr_storage storage{};
  socklen_t length = 0;
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
};

// The first message on a connection: who is calling, and the secret that only this lane's store holds.
struct Hello {
  uint64_t nonce;
  int32_t rank;
  int32_t world;
};

[[noreturn]] void throw_errno(const std::string& what) {
  TORCH_CHECK(false, what, ": ", std::strerror(errno), ".");
  std::abort();
}

bool bindable(const Address& address) {
  Socket probe(::socket(address.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  return probe.get() >= 0 && ::bind(probe.get(), address.get(), address.length) == 0;
}

Address address_of_interface(const std::string& name) {
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0) throw_errno("The network interfaces could not be listed");
  Address found;
  for (const ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr || name != entry->ifa_name) continue;
    const int family = entry->ifa_addr->sa_family;
    if (family != AF_INET && (family != AF_INET6 || found.length != 0)) continue;
    found.length = family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
    std::memcpy(&found.storage, entry->ifa_addr, found.length);
    if (family == AF_INET) break;
  }
  ::freeifaddrs(list);
  TORCH_CHECK(found.length != 0, "GLOO_SOCKET_IFNAME names the interface ", name,
              ", which has no address on this host: set it to one that `ip addr` lists.");
  return found;
}

Address local_address() {
  if (const char* name = std::getenv("GLOO_SOCKET_IFNAME"); name != nullptr && *name != '\0') {
    return address_of_interface(std::string(name, std::strcspn(name, ",")));
  }
  char host[256] = {};
  ::gethostname(host, sizeof(host) - 1);
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* list = nullptr;
  Address found;
  if (::getaddrinfo(host, nullptr, &hints, &list) == 0) {
    for (const addrinfo* entry = list; entry != nullptr && found.length == 0; entry = entry->ai_next) {
      Address candidate;
      candidate.length = entry->ai_addrlen;
      std::memcpy(&candidate.storage, entry->ai_addr, entry->ai_addrlen);
      if (bindable(candidate)) found = candidate;
    }
    ::freeaddrinfo(list);
  }
  if (found.length == 0) {  // no name that leads here: all workers must be on this host
    sockaddr_in loopback{};
    loopback.sin_family = AF_INET;
    loopback.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    std::memcpy(&found.storage, &loopback, sizeof(loopback));
    found.length = sizeof(loopback);
  }
  return found;
}

int milliseconds_left(Clock::time_point deadline) {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
  return static_cast<int>(std::clamp<int64_t>(left, 0, 1 << 30));
}

bool ready(int fd, short events, Clock::time_point deadline) {
  pollfd entry{fd, events, 0};
  int count;
  do {
    count = ::poll(&entry, 1, milliseconds_left(deadline));
  } while (count < 0 && errno == EINTR);
  return count > 0;
}

bool receive_hello(int fd, Hello* hello, Clock::time_point deadline) {
  size_t have = 0;
  while (have < sizeof(*hello)) {
    if (!ready(fd, POLLIN, deadline)) return false;
    const ssize_t got = ::recv(fd, reinterpret_cast<char*>(hello) + have, sizeof(*hello) - have, 0);
    if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) return false;
    if (got > 0) have += static_cast<size_t>(got);
  }
  return true;
}

Socket connect_to(const Address& peer, Clock::time_point deadline, const std::string& who) {
  Socket socket(::socket(peer.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (socket.get() < 0) throw_errno("A socket could not be opened");
  int error = ::connect(socket.get(), peer.get(), peer.length) == 0 ? 0 : errno;
  if (error == EINPROGRESS) {
    if (ready(socket.get(), POLLOUT, deadline)) {
      socklen_t size = sizeof(error);
      ::getsockopt(socket.get(), SOL_SOCKET, SO_ERROR, &error, &size);
    } else {
      error = ETIMEDOUT;
    }
  }
  TORCH_CHECK(error == 0, "The communication lane could not connect to ", who, " (", std::strerror(error),
              "): check that GLOO_SOCKET_IFNAME names an interface the other hosts can reach.");
  return socket;
}

template <typename T>
std::vector<uint8_t> to_bytes(const T& value) {
  const auto* begin = reinterpret_cast<const uint8_t*>(&value);
  return {begin, begin + sizeof(T)};
}

struct Published {
  Address address;
  uint64_t nonce;
};

// Connections by rank; -1 where there is none.
struct Connections {
  std::vector<Socket> called;
  std::vector<Socket> accepted;
};

// Calls the ranks `callees` and is called by the ranks `callers`, all of which must do likewise.
Connections connect_ranks(const c10::intrusive_ptr<c10d::Store>& store, const std::string& key, int rank,
                          int world, const std::vector<int>& callees, const std::vector<int>& callers,
                          std::chrono::milliseconds timeout) {
  const auto deadline = Clock::now() + timeout;
  Connections made;
  for (int peer = 0; peer < world; ++peer) {
    made.called.emplace_back(-1);
    made.accepted.emplace_back(-1);
  }

  Published self{local_address(),
                 (static_cast<uint64_t>(std::random_device{}()) << 32) | std::random_device{}()};
  Socket listener(::socket(self.address.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (listener.get() < 0 || ::bind(listener.get(), self.address.get(), self.address.length) != 0 ||
      ::listen(listener.get(), std::max(16, world)) != 0) {
    throw_errno("The communication lane could not listen for its peers");
  }
  ::getsockname(listener.get(), reinterpret_cast<sockaddr*>(&self.address.storage), &self.address.length);
  const auto name = [&key](int of) { return "dear/lane/" + key + "/" + std::to_string(of); };
  store->set(name(rank), to_bytes(self));

  for (const int callee : callees) {
    try {
      store->wait({name(callee)}, std::chrono::milliseconds(milliseconds_left(deadline)));
    } catch (const std::exception&) {
      TORCH_CHECK(false, "Rank ", callee, " did not join the communication lane within ", timeout.count(),
                  " ms: check that every rank of the process group makes the same call.");
    }
    const std::vector<uint8_t> bytes = store->get(name(callee));
    TORCH_CHECK(bytes.size() == sizeof(Published), "Rank ", callee, " runs another version of this library.");
    Published peer;
    std::memcpy(&peer, bytes.data(), sizeof(peer));

    Socket socket = connect_to(peer.address, deadline, "rank " + std::to_string(callee));
    const Hello hello{peer.nonce, rank, world};
    if (::send(socket.get(), &hello, sizeof(hello), MSG_NOSIGNAL) != static_cast<ssize_t>(sizeof(hello))) {
      throw_errno("The communication lane could not greet rank " + std::to_string(callee));
    }
    made.called[static_cast<size_t>(callee)] = std::move(socket);
  }
  std::vector<int> missing = callers;
  while (!missing.empty()) {  // strangers (port scanners) are turned away
    TORCH_CHECK(ready(listener.get(), POLLIN, deadline), "Rank ", missing.front(),
                " did not connect to rank ", rank, " within ", timeout.count(),
                " ms: check that it is alive and can reach this host.");
    Socket caller(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    Hello theirs{};
    const auto patience = std::min(deadline, Clock::now() + std::chrono::seconds(5));
    if (caller.get() < 0 || !receive_hello(caller.get(), &theirs, patience)) continue;
    const auto expected = std::find(missing.begin(), missing.end(), theirs.rank);
    if (theirs.nonce == self.nonce && theirs.world == world && expected != missing.end()) {
      made.accepted[static_cast<size_t>(theirs.rank)] = std::move(caller);
      missing.erase(expected);
    }
  }
  return made;
}

void set_option(int fd, int option, int value) {
  ::setsockopt(fd, IPPROTO_TCP, option, &value, sizeof(value));
}

}  // namespace

RingLinks::RingLinks(const c10::intrusive_ptr<c10d::Store>& store, const std::string& key, int rank,
                     int world, std::chrono::milliseconds timeout) {
  const int next = (rank + 1) % world;
  const int prev = (rank + world - 1) % world;
  Connections made = connect_ranks(store, key, rank, world, {next}, {prev}, timeout);
  to_next_ = made.called[static_cast<size_t>(next)].release();
  from_prev_ = made.accepted[static_cast<size_t>(prev)].release();
  set_option(to_next_, TCP_NODELAY, 1);
}

RingLinks::~RingLinks() {
  if (to_next_ >= 0) ::close(to_next_);
  if (from_prev_ >= 0) ::close(from_prev_);
}

MeshLinks::MeshLinks(const c10::intrusive_ptr<c10d::Store>& store, const std::string& key, int rank,
                     int world, std::chrono::milliseconds timeout) {
  std::vector<int> callees;
  std::vector<int> callers;
  for (int peer = 0; peer < world; ++peer) {
    if (peer != rank) (peer > rank ? callees : callers).push_back(peer);
  }
  Connections made = connect_ranks(store, key, rank, world, callees, callers, timeout);
  for (int peer = 0; peer < world; ++peer) {
    const auto at = static_cast<size_t>(peer);
    peers_.push_back((peer > rank ? made.called[at] : made.accepted[at]).release());
    if (peer == rank) continue;
    set_option(peers_.back(), TCP_NODELAY, 1);
    // See Note [One after another] at MeshTransfer.
    set_option(peers_.back(), TCP_NOTSENT_LOWAT, kMeshUnsent);
  }
}

MeshLinks::~MeshLinks() {
  for (const int peer : peers_) {
    if (peer >= 0) ::close(peer);
  }
}

void MeshLinks::shut_down() const {
  for (const int peer : peers_) {
    if (peer >= 0) ::shutdown(peer, SHUT_RDWR);
  }
}

}  // namespace dear
