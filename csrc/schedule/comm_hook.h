#pragma once

#include <functional>
#include <memory>
#include <torch/csrc/distributed/c10d/reducer.hpp>

#include "schedule/compressed_hook.h"
#include "schedule/scheduler.h"

namespace dear {

// How often DDP called the hook, and how often it did so with the interpreter locked: the second must stay 0.
struct HookCalls {
  int64_t total = 0;
  int64_t with_gil = 0;
};

// Tells whether the calling thread holds the interpreter lock.
using HoldsGil = std::function<bool()>;

// Registers the scheduler as the one communication hook of a DDP reducer, and tells the reducer to leave
// .grad alone afterwards. `learns_graph`: the reducer is new, and learns a static graph from its first pass.
void register_scheduler(c10d::Reducer& reducer, std::shared_ptr<Scheduler> scheduler,
                        std::shared_ptr<HookCalls> calls, HoldsGil holds_gil, bool learns_graph);

// Makes the reducer rebuild its buckets now, at the end of its first backward pass, and not before the next
// forward pass: the scheduler's incoming gradients move into the new buckets. Collective. Nothing happens
// where the reducer has rebuilt them already, or never does.
void rebuild_buckets(c10d::Reducer& reducer, Scheduler& scheduler);

// The same for a compressor's hook, whose groups move to the new buckets: nothing of a pass is kept in them.
void rebuild_buckets(c10d::Reducer& reducer, CompressedHook& hook);

// Moves the scheduler's incoming gradients into the buckets of another reducer of the same parameters.
void take_buckets(c10d::Reducer& reducer, Scheduler& scheduler);

// Whether a forward pass has prepared the reducer for a backward pass, none of which has been reduced since.
bool expects_gradients(const c10d::Reducer& reducer);

// Registers the hook of a compressor: .grad becomes the aggregate.
void register_compressed_hook(c10d::Reducer& reducer, std::shared_ptr<CompressedHook> hook,
                              std::shared_ptr<HookCalls> calls, HoldsGil holds_gil);

}  // namespace dear
