#include "collectives/fork.h"

#include <pthread.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace dear {
namespace {

std::atomic<uint32_t> generation{0};

[[maybe_unused]] const int registered = ::pthread_atfork(nullptr, nullptr, [] { ++generation; });

}  // namespace

uint32_t fork_generation() { return generation.load(std::memory_order_relaxed); }

void HomeProcess::check(const char* what) const {
  if (!away()) return;
  throw std::runtime_error(std::string(what) +
                           " belongs to the process that made it, and this is a child forked from that one: "
                           "communicate in the parent, and give children (DataLoader workers) finished "
                           "values only.");
}

}  // namespace dear
