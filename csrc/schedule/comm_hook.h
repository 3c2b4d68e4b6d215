#pragma once

#include <functional>
#include <memory>
#include <torch/csrc/distributed/c10d/reducer.hpp>

#include "schedule/scheduler.h"

namespace dear {

// How often DDP called the hook, and how often it did so with the interpreter locked: the second must stay 0.
struct HookCalls {
  int64_t total = 0;
  int64_t with_gil = 0;
};

// Registers the scheduler as the one communication hook of a DDP reducer, and tells the reducer to leave
// .grad alone afterwards. `holds_gil` tells whether the calling thread holds the interpreter lock.
void register_scheduler(c10d::Reducer& reducer, std::shared_ptr<Scheduler> scheduler,
                        std::shared_ptr<HookCalls> calls, std::function<bool()> holds_gil);

}  // namespace dear
