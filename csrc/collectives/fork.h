#pragma once

#include <cstdint>
#include <memory>
#include <utility>

namespace dear {

// How often this process was forked from another since this library was loaded there: another number in a
// child than in its parent.
uint32_t fork_generation();

// Note [Forked children]
// A child made by fork has copies of our objects, and none of their threads. Mutexes may stand locked for
// ever, condition variables count waiters that do not exist (and their destructors wait for them), and
// sockets are its parent's as well. So whoever has threads or sockets remembers the process that made it, and
// elsewhere does nothing: no join, no lock, no shutdown; what cannot be destroyed there is left.

// The process in which an object was made.
class HomeProcess {
 public:
  bool away() const { return made_in_ != fork_generation(); }
  // Throws one sentence in a forked child; `what`: "An exchange".
  void check(const char* what) const;

 private:
  uint32_t made_in_ = fork_generation();
};

// Owns a T whose destructor must not run in a forked child.
template <typename T>
class HomeOnly {
 public:
  template <typename... Args>
  explicit HomeOnly(Args&&... args) : value_(std::make_unique<T>(std::forward<Args>(args)...)) {}
  ~HomeOnly() {
    if (home_.away()) [[maybe_unused]]
      T* left = value_.release();
  }
  HomeOnly(const HomeOnly&) = delete;
  HomeOnly& operator=(const HomeOnly&) = delete;
  T* operator->() const { return value_.get(); }

 private:
  HomeProcess home_;
  std::unique_ptr<T> value_;
};

}  // namespace dear
