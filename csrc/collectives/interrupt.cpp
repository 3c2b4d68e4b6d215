#include "collectives/interrupt.h"

#include <atomic>

namespace dear {
namespace {

std::atomic<InterruptCheck> current{nullptr};

}  // namespace

void set_interrupt_check(InterruptCheck check) { current = check; }

void check_interrupt() {
  if (const InterruptCheck check = current) check();
}

}  // namespace dear
