#include "collectives/rendezvous.h"

#include <netdb.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "collectives/address.h"
#include "collectives/hello.h"
#include "collectives/interrupt.h"

// Errors here are one sentence, without torch's stack.
#define DEAR_REQUIRE(condition, ...) \
  if (!(condition)) throw std::runtime_error(c10::str(__VA_ARGS__))

namespace dear {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr auto kPatience = std::chrono::seconds(5);  // with a caller that does not say who it is
constexpr size_t kMostStrangers = 64;                // at a time; the oldest gives way
constexpr int kMostHangUps = 3;                      // by a listener whose patience had not run out

// A connection on which one message of a fixed size is awaited.
struct Talk {
  Socket socket;
  std::string came;

  // Reads on; true when `message` is complete. Clears `alive` when the other side has hung up.
  template <typename Message>
  bool read(Message* message, bool* alive) {
    char buffer[sizeof(Message)];
    const ssize_t got = ::recv(socket.get(), buffer, sizeof(Message) - came.size(), MSG_DONTWAIT);
    if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) *alive = false;
    if (got > 0) came.append(buffer, static_cast<size_t>(got));
    if (came.size() < sizeof(Message)) return false;
    std::memcpy(message, came.data(), sizeof(Message));
    came.clear();
    return true;
  }

  template <typename Message>
  bool write(const Message& message) {  // there is room: it is the first or second on this connection
    return ::send(socket.get(), &message, sizeof(message), MSG_NOSIGNAL) == ssize_t(sizeof(message));
  }
};

struct Callee : Talk {
  enum class Stage { kAbsent, kConnecting, kChallenged, kGreeted, kDone };
  int rank = 0;
  Stage stage = Stage::kAbsent;
  Nonce nonce{};
  Nonce challenge{};
  Clock::time_point called;
  int hang_ups = 0;
};

struct Caller : Talk {
  Nonce challenge{};
  Clock::time_point deadline;
};

class Rendezvous {
 public:
  Rendezvous(Peers& peers, const Members& members, const c10::intrusive_ptr<c10d::Store>& store,
             const std::string& lane, const std::vector<int>& callees, const std::vector<int>& callers,
             milliseconds timeout)
      : peers_(peers),
        members_(members),
        store_(store),
        lane_(lane),
        missing_(callers),
        timeout_(timeout),
        deadline_(Clock::now() + timeout),
        nonce_(random_nonce()) {
    made_.called.resize(static_cast<size_t>(peers.world()));
    made_.accepted.resize(static_cast<size_t>(peers.world()));
    for (const int rank : callees) {
      callees_.emplace_back();
      callees_.back().rank = rank;
    }
  }

  Connections run() {
    try {
      publish();
      while (!connected()) serve();
      put(name("ready", peers_.rank()), "1");
      while (!all("ready")) serve();
      return std::move(made_);
    } catch (const std::exception& error) {
      tell(error);
      throw;
    }
  }

 private:
  // --- the store ---

  std::string name(const std::string& what, int rank) const {
    return "dear/lane/" + lane_ + "/" + what + "/" + std::to_string(rank);
  }

  template <typename Work>
  auto on_store(Work work) -> decltype(work()) {
    try {
      return work();
    } catch (const std::exception& error) {
      const std::string what = error.what();
      throw std::runtime_error(
          c10::str("The process group's store failed while rank ", peers_.rank(),
                   " set up communication lane ", lane_, " (", what.substr(0, what.find('\n')),
                   "): the process that serves it, usually rank 0, has probably ended."));
    }
  }

  void put(const std::string& key, const std::string& text) {
    on_store([&] { store_->set(key, std::vector<uint8_t>(text.begin(), text.end())); });
  }

  bool present(const std::string& what, int rank) {
    return on_store([&] { return store_->check({name(what, rank)}); });
  }

  bool all(const std::string& what) {
    std::vector<std::string> names;
    for (const int rank : members_.ranks()) names.push_back(name(what, rank));
    return on_store([&] { return store_->check(names); });
  }

  void publish() {
    Address address = parse_address(peers_.address(), "0");
    listener_ = Socket(::socket(address.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    DEAR_REQUIRE(listener_.get() >= 0 && ::bind(listener_.get(), address.get(), address.length) == 0 &&
                     ::listen(listener_.get(), std::max(128, peers_.world())) == 0,
                 "Rank ", peers_.rank(), " could not listen on ", peers_.address(), " for its peers (",
                 std::strerror(errno), "): set GLOO_SOCKET_IFNAME to an interface that `ip addr` lists.");
    char port[NI_MAXSERV] = {};
    ::getsockname(listener_.get(), address.get(), &address.length);
    ::getnameinfo(address.get(), address.length, nullptr, 0, port, sizeof(port), NI_NUMERICSERV);
    const Published self{peers_.address(), port, nonce_, peers_.check().contents, peers_.keyed()};
    on_store([&] { store_->set(name("address", peers_.rank()), self.encoded()); });
  }

  // Another rank has failed to set up the lane: its words become ours.
  void heed() {
    const std::string key = name("failed", 0);
    if (!on_store([&] { return store_->check({key}); })) return;
    const std::vector<uint8_t> text = on_store([&] { return store_->get(key); });
    heard_ = true;
    throw std::runtime_error(sanitised(std::string(text.begin(), text.end())));
  }

  void tell(const std::exception& error) {
    if (heard_) return;
    std::string text = error.what();
    text = text.substr(0, std::min(text.find('\n'), kLongestNews / 2));
    if (text.rfind("Rank", 0) != 0) {  // it was interrupted, say
      text = c10::str("Rank ", peers_.rank(), " gave up setting up communication lane ", lane_, " (", text,
                      ").");
    }
    try {
      put(name("failed", 0), text);
    } catch (const std::exception&) {  // nobody to tell
    }
  }

  // Who has ended? The connections that have been made here tell, and those of lanes made before.
  void check_alive() {
    for (const auto* made : {&made_.called, &made_.accepted}) {
      for (int rank = 0; rank < peers_.world(); ++rank) {
        const int fd = (*made)[static_cast<size_t>(rank)].get();
        if (fd < 0 || still_open(fd)) continue;
        heed();  // it may have said why
        if (all("ready")) return;
        throw make_failure({rank}, complaint::closed(), "set-up", "communication lane " + lane_,
                           peers_.rank());
      }
    }
    if (const auto news = peers_.investigate("set-up", "communication lane " + lane_, milliseconds(0))) {
      heed();  // its lanes end behind its words, too
      throw Failure(*news);
    }
  }

  // --- connections ---

  bool connected() const {
    return missing_.empty() && std::all_of(callees_.begin(), callees_.end(), [](const Callee& callee) {
             return callee.stage == Callee::Stage::kDone;
           });
  }

  // Waits a moment for whatever comes, and takes it.
  void serve() {
    check_interrupt();
    if (Clock::now() >= deadline_) give_up();
    for (Callee& callee : callees_) {
      if (callee.stage == Callee::Stage::kAbsent && present("address", callee.rank)) call(callee);
    }
    if (Clock::now() >= next_heed_) {
      heed();
      check_alive();
      next_heed_ = Clock::now() + milliseconds(100);
    }
    std::vector<pollfd> entries{{listener_.get(), POLLIN, 0}};
    for (const Callee& callee : callees_) {
      const bool open = callee.stage != Callee::Stage::kAbsent && callee.stage != Callee::Stage::kDone;
      const short events = callee.stage == Callee::Stage::kConnecting ? POLLOUT : POLLIN;
      entries.push_back({open ? callee.socket.get() : -1, events, 0});
    }
    for (const Caller& caller : callers_) entries.push_back({caller.socket.get(), POLLIN, 0});
    const int patience = pause_;
    pause_ = std::min(2 * pause_, 20);
    if (::poll(entries.data(), entries.size(), patience) > 0) pause_ = 1;
    size_t at = 1;
    for (Callee& callee : callees_) {
      if (entries[at++].revents != 0) advance(callee);
    }
    const auto heard = [&](const Caller& caller) {
      return entries[at + static_cast<size_t>(&caller - callers_.data())].revents != 0;
    };
    std::vector<Caller> staying;
    for (Caller& caller : callers_) {
      // Where this rank itself was late, what it has not looked at may have come in time.
      const bool late = Clock::now() >= caller.deadline;
      const bool stays = heard(caller) || late ? hear(caller) : true;
      if (stays && !late) staying.push_back(std::move(caller));
    }
    callers_ = std::move(staying);
    if (entries[0].revents != 0) accept();
  }

  void call(Callee& callee) {
    const Published peer =
        Published::decoded(on_store([&] { return store_->get(name("address", callee.rank)); }), callee.rank);
    DEAR_REQUIRE(peer.checked == peers_.check().contents, "Ranks ", peers_.rank(), " and ", callee.rank,
                 " disagree on DEAR_CHECKSUM: set it on every rank alike, or on none.");
    DEAR_REQUIRE(peer.keyed == peers_.keyed(), "Rank ", peer.keyed ? callee.rank : peers_.rank(),
                 " has a DEAR_SHARED_KEY and rank ", peer.keyed ? peers_.rank() : callee.rank,
                 " has none: set the same one on every rank, or none.");
    Address address = parse_address(peer.host, peer.port);
    callee.nonce = peer.nonce;
    callee.called = Clock::now();
    callee.socket =
        Socket(::socket(address.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    callee.stage = Callee::Stage::kConnecting;
    if (::connect(callee.socket.get(), address.get(), address.length) != 0 && errno != EINPROGRESS)
      unreachable(callee.rank, errno);
  }

  [[noreturn]] void unreachable(int rank, int error) {
    heed();  // who has failed closes its listener behind its words
    throw std::runtime_error(c10::str("Rank ", peers_.rank(), " could not connect to rank ", rank, " (",
                                      std::strerror(error), ") for communication lane ", lane_,
                                      ": check that it is alive, and that GLOO_SOCKET_IFNAME names an "
                                      "interface the other hosts can reach."));
  }

  void advance(Callee& callee) {
    if (callee.stage == Callee::Stage::kConnecting) {
      int error = 0;
      socklen_t size = sizeof(error);
      ::getsockopt(callee.socket.get(), SOL_SOCKET, SO_ERROR, &error, &size);
      if (error != 0) unreachable(callee.rank, error);
      callee.stage = Callee::Stage::kChallenged;
      return;
    }
    bool alive = true;
    Challenge theirs{};
    Welcome welcome{};
    if (callee.stage == Callee::Stage::kChallenged && callee.read(&theirs, &alive)) {
      callee.challenge = random_nonce();
      alive = callee.write(Hello{kHelloMagic, peers_.rank(), peers_.world(), callee.challenge,
                                 tag("hello", callee.nonce, theirs.challenge, peers_.rank())});
      callee.stage = Callee::Stage::kGreeted;
    } else if (callee.stage == Callee::Stage::kGreeted && callee.read(&welcome, &alive)) {
      if (welcome.tag != tag("welcome", callee.nonce, callee.challenge, callee.rank)) unknown(callee.rank);
      callee.stage = Callee::Stage::kDone;
      made_.called[static_cast<size_t>(callee.rank)] = std::move(callee.socket);
    }
    if (!alive) call_again(callee);
  }

  // The listener has hung up. So it does on whom it does not recognise, at once; on who has not said in time
  // who it is, as this rank where the machine was busy; and on the oldest of many strangers.
  void call_again(Callee& callee) {
    const bool late = Clock::now() - callee.called >= kPatience;
    if (!late && ++callee.hang_ups >= kMostHangUps) unknown(callee.rank);
    callee.came.clear();
    callee.stage = Callee::Stage::kAbsent;
  }

  [[noreturn]] void unknown(int rank) {
    heed();
    throw std::runtime_error(c10::str(
        "Rank ", rank, " and rank ", peers_.rank(), " did not recognise each other for communication lane ",
        lane_,
        ": check that DEAR_SHARED_KEY is the same on every rank, and that no process answers in its place."));
  }

  uint64_t tag(const char* role, const Nonce& nonce, const Nonce& challenge, int rank) const {
    return hello_tag(peers_.key(), role, lane_, nonce, challenge, rank, peers_.world());
  }

  void accept() {
    Caller caller;
    caller.socket = Socket(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (caller.socket.get() < 0) return;
    caller.challenge = random_nonce();
    caller.deadline = Clock::now() + kPatience;
    if (!caller.write(Challenge{kHelloMagic, caller.challenge})) return;
    if (callers_.size() >= kMostStrangers + missing_.size()) callers_.erase(callers_.begin());
    callers_.push_back(std::move(caller));
  }

  // Returns whether more is to come from it. Connections from no rank (port scanners) are closed.
  bool hear(Caller& caller) {
    bool alive = true;
    Hello hello{};
    if (!caller.read(&hello, &alive)) return alive;
    const auto expected = std::find(missing_.begin(), missing_.end(), hello.rank);
    if (hello.magic != kHelloMagic || hello.world != peers_.world() || expected == missing_.end() ||
        hello.tag != tag("hello", nonce_, caller.challenge, hello.rank) ||
        !caller.write(Welcome{kHelloMagic, tag("welcome", nonce_, hello.challenge, peers_.rank())})) {
      return false;
    }
    made_.accepted[static_cast<size_t>(hello.rank)] = std::move(caller.socket);
    missing_.erase(expected);
    return false;
  }

  void give_up() {
    heed();
    if (all("ready")) return;  // this rank itself was late
    std::string absent;
    int count = 0;
    for (const int rank : members_.ranks()) {
      if (present("address", rank)) continue;
      absent += (count++ == 0 ? "" : " and rank ") + std::to_string(rank);
    }
    DEAR_REQUIRE(count == 0, "Rank ", absent, " did not join communication lane ", lane_, " within ",
                 timeout_.count(), " ms, as rank ", peers_.rank(),
                 " saw it: check that every rank of the process group makes the same call.");
    for (const Callee& callee : callees_) {
      DEAR_REQUIRE(callee.stage == Callee::Stage::kDone, "Rank ", callee.rank, " did not answer rank ",
                   peers_.rank(), " within ", timeout_.count(), " ms when communication lane ", lane_,
                   " was set up: check that it is alive and that this host can reach it.");
    }
    DEAR_REQUIRE(missing_.empty(), "Rank ", missing_.front(), " did not connect to rank ", peers_.rank(),
                 " within ", timeout_.count(), " ms when communication lane ", lane_,
                 " was set up: check that it is alive and can reach this host.");
    for (const int rank : members_.ranks()) {
      DEAR_REQUIRE(present("ready", rank), "Rank ", rank, " joined communication lane ", lane_,
                   " and did not finish setting it up within ", timeout_.count(), " ms, as rank ",
                   peers_.rank(), " saw it: check that it is alive and can reach the other hosts.");
    }
    throw std::runtime_error("Communication lane " + lane_ + " was not set up in time.");
  }

  Peers& peers_;
  const Members& members_;
  const c10::intrusive_ptr<c10d::Store> store_;
  const std::string lane_;
  std::vector<int> missing_;  // callers
  const milliseconds timeout_;
  const Clock::time_point deadline_;
  const Nonce nonce_;
  Socket listener_;
  std::vector<Callee> callees_;
  std::vector<Caller> callers_;  // who have not said who they are
  Connections made_;
  Clock::time_point next_heed_{};
  bool heard_ = false;
  int pause_ = 1;  // ms
};

}  // namespace

Socket::~Socket() {
  if (fd_ >= 0) ::close(fd_);
}

Connections connect_ranks(Peers& peers, const Members& members, const c10::intrusive_ptr<c10d::Store>& store,
                          const std::string& lane, const std::vector<int>& callees,
                          const std::vector<int>& callers, milliseconds timeout) {
  return Rendezvous(peers, members, store, lane, callees, callers, timeout).run();
}

}  // namespace dear
