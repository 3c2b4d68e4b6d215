// Lanes of several ranks in one process, under ThreadSanitizer: exchanges, failures, leaving, all at once.
// Run by `make tsan`. Ends with 0 when results are right and the sanitizer found no race.
#include <ATen/ATen.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <torch/csrc/distributed/c10d/HashStore.hpp>

#include "collectives/at_exit.h"
#include "collectives/mesh.h"
#include "collectives/ring.h"

// An exception's reference count lives in the C++ library, a tensor's is decremented before a fence in
// torch's: neither is instrumented.
extern "C" const char* __tsan_default_suppressions() {
  return "race:std::__exception_ptr::exception_ptr::_M_release\n"
         "race:dear::Failure::~Failure\n"
         "race:std::runtime_error::~runtime_error\n"
         "race:std::rethrow_exception\n"
         "race:c10::intrusive_ptr<c10::TensorImpl*::reset_\n";
}

namespace {

using dear::Exchange;
using dear::Lane;
using dear::Phase;
using dear::Reduction;

constexpr int kWorld = 3;
constexpr int64_t kChunk = 50'000;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(2);
}

// What one rank has.
struct Rank {
  std::shared_ptr<dear::Peers> peers;
  std::shared_ptr<Lane> reduce;
  std::shared_ptr<Lane> gather;
  std::shared_ptr<Lane> mesh;
};

template <typename Work>
void in_ranks(Work work) {
  std::vector<std::thread> threads;
  for (int rank = 0; rank < kWorld; ++rank) threads.emplace_back([&work, rank] { work(rank); });
  for (std::thread& thread : threads) thread.join();
}

std::vector<Rank> make_ranks(std::chrono::milliseconds timeout) {
  const auto store = c10::make_intrusive<c10d::HashStore>();
  std::vector<Rank> ranks(kWorld);
  in_ranks([&](int rank) {
    Rank& one = ranks[static_cast<size_t>(rank)];
    one.peers = std::make_shared<dear::Peers>(rank, kWorld, "127.0.0.1", true, "", "");
    one.reduce = std::make_shared<dear::RingLane>(one.peers, store, "reduce", timeout);
    one.gather = std::make_shared<dear::RingLane>(one.peers, store, "gather", timeout);
    one.mesh = std::make_shared<dear::MeshLane>(one.peers, store, "mesh", timeout);
  });
  return ranks;
}

std::shared_ptr<Exchange> submit(Lane& lane, Phase phase, const dear::Part& part) {
  auto exchange = lane.make_exchange(phase, Reduction::kAverage, {part}, "fusion group 1");
  lane.submit(exchange);
  return exchange;
}

// A reduce-scatter, a deferred all-gather of its result, and an all-to-all beside them.
void moves_what_it_should() {
  std::vector<Rank> ranks = make_ranks(std::chrono::seconds(60));
  in_ranks([&](int rank) {
    Rank& one = ranks[static_cast<size_t>(rank)];
    for (int step = 0; step < 20; ++step) {
      const at::Tensor input = at::full({kWorld * kChunk}, double(rank + step));
      const at::Tensor full = at::zeros({kWorld * kChunk});
      const at::Tensor shard = full.narrow(0, rank * kChunk, kChunk);
      const at::Tensor received = at::empty({kWorld * kChunk});
      const auto reduced = submit(*one.reduce, Phase::kReduceScatter, {input, shard});
      auto gathered = one.gather->make_exchange(Phase::kAllGather, Reduction::kSum, {{full, shard}}, "group");
      gathered->defer([reduced]() -> std::shared_ptr<Exchange> {
        reduced->wait();
        return nullptr;
      });
      one.gather->submit(gathered);
      const auto swapped = submit(*one.mesh, Phase::kAllToAll, {input, received});
      gathered->wait();
      swapped->wait();
      require(full.eq(double(step + 1)).all().item<bool>(), "an average is wrong");
      require(received.narrow(0, 2 * kChunk, kChunk).eq(double(step + 2)).all().item<bool>(),
              "a row is wrong");
    }
  });
}

// One rank leaves while the others wait on different lanes.
void hears_who_leaves() {
  std::vector<Rank> ranks = make_ranks(std::chrono::seconds(60));
  in_ranks([&](int rank) {
    Rank& one = ranks[static_cast<size_t>(rank)];
    if (rank == 1) {
      one.gather.reset();
      one.reduce.reset();
      one.mesh.reset();
      return;
    }
    const at::Tensor full = at::ones({kWorld * kChunk});
    const auto exchange =
        submit(rank == 0 ? *one.mesh : *one.reduce, rank == 0 ? Phase::kAllToAll : Phase::kReduceScatter,
               {full, at::empty({rank == 0 ? kWorld * kChunk : kChunk})});
    try {
      exchange->wait();
      require(false, "nobody was missed");
    } catch (const std::exception& error) {
      require(std::string(error.what()).rfind("Rank 1 left", 0) == 0, error.what());
    }
  });
}

// One rank does not come; two lanes time out at once, and all say the same.
void names_who_is_missing() {
  std::vector<Rank> ranks = make_ranks(std::chrono::milliseconds(500));
  in_ranks([&](int rank) {
    if (rank == 2) return;
    Rank& one = ranks[static_cast<size_t>(rank)];
    const at::Tensor full = at::ones({kWorld * kChunk});
    for (const auto& exchange : {submit(*one.reduce, Phase::kReduceScatter, {full, at::empty({kChunk})}),
                                 submit(*one.mesh, Phase::kAllToAll, {full, at::empty({kWorld * kChunk})})}) {
      try {
        exchange->wait();
        require(false, "nobody was missed");
      } catch (const std::exception& error) {
        require(std::string(error.what()).rfind("Rank 2 ", 0) == 0, error.what());
      }
    }
  });
}

// Rank 1 waits for rank 2 on one lane, and rank 0 for rank 1 on another one, which has less patience. Rank 2
// comes after all, or does not.
template <typename Kind>
void says_for_whom_it_waits(Phase phase, bool comes) {
  using std::chrono::milliseconds;
  const auto store = c10::make_intrusive<c10d::HashStore>();
  in_ranks([&](int rank) {
    const auto peers = std::make_shared<dear::Peers>(rank, kWorld, "127.0.0.1", true, "", "");
    const auto make = [&](const char* name, int patience, std::vector<int> ranks) {
      return std::make_shared<Kind>(peers, store, name, milliseconds(patience), std::move(ranks));
    };
    std::shared_ptr<Lane> later = rank > 0 ? make("later", 4000, {1, 2}) : nullptr;
    std::shared_ptr<Lane> sooner = rank < 2 ? make("sooner", 2000, {0, 1}) : nullptr;
    const auto move = [&](Lane& lane) {
      const at::Tensor full = at::ones({2 * kChunk});
      return submit(lane, phase, {full, at::empty({phase == Phase::kAllToAll ? 2 * kChunk : kChunk})});
    };
    try {
      for (int again = 0; again < 2; ++again) {
        if (rank == 2 && again == 0) std::this_thread::sleep_for(milliseconds(comes ? 1500 : 5000));
        if (rank == 2 && !comes) return;
        for (const auto& lane : rank == 0 ? std::vector{sooner} : std::vector{later, sooner}) {
          if (lane) move(*lane)->wait();
        }
      }
      require(comes, "nobody was missed");
    } catch (const std::exception& error) {
      require(!comes && std::string(error.what()).rfind("Rank 2 ", 0) == 0, error.what());
    }
  });
}

// At the end of the program: a lane's exchange waits for another lane's, one is being dropped, and who takes
// itself back meanwhile is waited for. Nothing that comes later is.
void ends_all_threads() {
  std::vector<Rank> ranks = make_ranks(std::chrono::seconds(60));
  const at::Tensor full = at::ones({kWorld * kChunk});
  const auto reduced =
      submit(*ranks[0].reduce, Phase::kReduceScatter, {full, at::empty({kChunk})});  // alone in it
  auto gathered = ranks[0].gather->make_exchange(Phase::kAllGather, Reduction::kSum,
                                                 {{full, full.narrow(0, 0, kChunk)}}, "group");
  gathered->defer([reduced]() -> std::shared_ptr<Exchange> {
    reduced->wait();
    return nullptr;
  });
  ranks[0].gather->submit(gathered);
  std::atomic<bool> begun{false}, ended{false};
  std::thread dropping([&] { ranks[1] = Rank(); });
  std::thread leaving([&] {
    dear::AtExit at_exit([] {}, [] {});
    at_exit.cancel([&] {
      begun = true;
      std::this_thread::sleep_for(std::chrono::milliseconds(300));
      ended = true;
    });
  });
  while (!begun) std::this_thread::yield();
  dear::stop_threads();
  require(ended, "what was under way was not waited for");
  require(reduced->done() && gathered->done(), "an exchange is left");
  dropping.join();
  leaving.join();
  require(!dear::AtExit([] {}, [] {}).cancel([] {}), "behind the end something was begun");
}

}  // namespace

int main() {
  moves_what_it_should();
  for (int again = 0; again < 5; ++again) hears_who_leaves();
  names_who_is_missing();
  for (const bool comes : {true, false}) {
    says_for_whom_it_waits<dear::RingLane>(Phase::kReduceScatter, comes);
    says_for_whom_it_waits<dear::MeshLane>(Phase::kAllToAll, comes);
  }
  ends_all_threads();
  std::puts("ok");
}
