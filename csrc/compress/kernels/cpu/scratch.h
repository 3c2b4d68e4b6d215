// Memory for the kernels' intermediate values.
#pragma once

#include <cstdint>
#include <new>
#include <vector>

namespace dear::compress::cpu {

// Begins at a cache line: a vector that lies across two lines takes two loads.
template <typename T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  LineAllocator() = default;
  template <typename Other>
  LineAllocator(const LineAllocator<Other>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
  void deallocate(T* memory, size_t) { ::operator delete(memory, kLine); }
  template <typename Other>
  bool operator==(const LineAllocator<Other>&) const {
    return true;
  }
  template <typename Other>
  bool operator!=(const LineAllocator<Other>&) const {
    return false;
  }
};

// At least `size` elements, the thread's own, from the start of a cache line on. It grows to its largest use
// and stays: no allocation in steady state. Each call may give the same memory as the last one of this
// thread, and may move it.
template <typename T>
T* thread_scratch(int64_t size) {
  static thread_local std::vector<T, LineAllocator<T>> scratch;
  if (static_cast<int64_t>(scratch.size()) < size) scratch.resize(size);
  return scratch.data();
}

}  // namespace dear::compress::cpu
