#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>

namespace dear {

// Note [Ctrl-C]
// A signal's handler in Python runs when the interpreter's main thread next has the interpreter. A wait in
// native code would keep it from that until the network's timeout. So waits wake up now and then and ask
// whether they shall go on. A handler may wait for the very same thing, as one that saves the model does:
// then the inner wait does what is done behind it, and the outer one finds it done.

// What is asked; it throws in order to end the wait. Null: nothing is asked.
using InterruptCheck = void (*)();
void set_interrupt_check(InterruptCheck check);
void check_interrupt();

// Waits until `done`, and asks check_interrupt() every 200 ms, without the lock.
template <typename Predicate>
void wait_interruptibly(std::condition_variable& changed, std::unique_lock<std::mutex>& lock,
                        Predicate done) {
  while (!changed.wait_for(lock, std::chrono::milliseconds(200), done)) {
    lock.unlock();
    check_interrupt();
    lock.lock();
  }
}

}  // namespace dear
