// Stores that go past the caches, for results that are larger than a cache.
//
// Note [Streamed results]
// A plain store first reads the line that it is about to overwrite, and pushes out another that somebody may
// still want: writing a result costs twice its bytes. A store of a whole line that goes past the caches costs
// them once. It pays where the result is not in a cache by the time it is read, so a small one is written
// plainly.
#pragma once

#include <cstdint>

#include "compress/kernels/cpu/cast.h"

namespace dear::compress::cpu {

// Elements from which on a result is streamed: 1 MiB, which no core's own cache keeps until the optimizer
// reads it.
constexpr int64_t kStreamed = int64_t{1} << 18;

// target = source, of n floats, past the caches. Others may see it after a StreamFence.
void store_streamed(const float* source, int64_t n, float* target);

// At its end, what its thread has streamed comes before whatever the thread stores next.
struct StreamFence {
  StreamFence() = default;
  StreamFence(const StreamFence&) = delete;
  StreamFence& operator=(const StreamFence&) = delete;
  ~StreamFence();
};

// A result of `numel` decoded elements, and how a part of it gets there. Whoever stores has a StreamFence
// around it.
class DecodedResult {
 public:
  DecodedResult(void* out, GradType type, int64_t numel)
      : out_(out), type_(type), streamed_(type == GradType::kFloat32 && numel >= kStreamed) {}

  // Where the values from element `begin` on are to be computed: in their place, or in `scratch`.
  float* values(int64_t begin, float* scratch) const {
    return type_ == GradType::kFloat32 && !streamed_ ? static_cast<float*>(out_) + begin : scratch;
  }
  // Takes them, held within the range of the result's type. `values` may be changed.
  void store(int64_t begin, int64_t n, float* values) const {
    if (type_ != GradType::kFloat32) {
      store_within_range(values, type_, n, element(out_, type_, begin));
    } else if (streamed_) {
      store_streamed(values, n, static_cast<float*>(out_) + begin);
    }
  }

 private:
  void* const out_;
  const GradType type_;
  const bool streamed_;
};

}  // namespace dear::compress::cpu
