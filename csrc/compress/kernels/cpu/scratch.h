// Memory for the kernels' intermediate values.
#pragma once

#include <cstdint>
#include <vector>

namespace dear::compress::cpu {

// At least `size` elements, the thread's own. It grows to its largest use and stays: no allocation in steady
// state. Each call may give the same memory as the last one of this thread, and may move it.
template <typename T>
T* thread_scratch(int64_t size) {
  static thread_local std::vector<T> scratch;
  if (static_cast<int64_t>(scratch.size()) < size) scratch.resize(size);
  return scratch.data();
}

}  // namespace dear::compress::cpu
