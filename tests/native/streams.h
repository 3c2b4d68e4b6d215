// What the parts of the program of streams.cpp have in common.
#pragma once

#include <torch/csrc/autograd/variable.h>

#include <cstdio>
#include <cstdlib>
#include <functional>

#include "collectives/native.h"
#include "emulated_streams.h"

namespace streams {

using dear::Exchange;
using dear::Lane;
using dear::Phase;
using dear::Reduction;
using namespace emulated;

constexpr int64_t kNumel = 16;

inline void require(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(2);
}

// The works of its collectives are "NAME 0", "NAME 1" and so on.
inline std::shared_ptr<Lane> make_lane(const std::string& name, int world = 2, int rank = 0) {
  return std::make_shared<dear::NativeLane>(c10::make_intrusive<Group>(name, rank, world));
}

// Calls `deliver` as DDP calls its hook: inside a backward pass, on a stream that is not its caller's, behind
// which autograd puts the caller's before it runs what was queued for the end.
inline void backward(const std::function<void()>& deliver) {
  at::Tensor x = zeros(1).requires_grad_();
  x.register_hook([&](const at::Tensor&) {
    on(kBackward, deliver);
    follow(kTraining, kBackward);
  });
  x.sum().backward();
}

// The cases of streams_compressed.cpp.
void compression();

}  // namespace streams
