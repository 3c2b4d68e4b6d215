#pragma once

#include <memory>
#include <optional>
#include <string>

#include "collectives/clock.h"
#include "schedule/scheduler.h"

namespace dear {

// An update on the training thread, for the trace and for torch's profiler; without them it is two branches.
class UpdateSpan {
 public:
  // `group`: none where all fusion groups are updated at once.
  UpdateSpan(std::shared_ptr<Scheduler> scheduler, std::optional<size_t> group)
      : scheduler_(std::move(scheduler)), group_(group) {}

  void begin() {
    if (!scheduler_->timeline().tracing() && !profiled()) return;
    name_ = group_ ? "fusion group " + std::to_string(*group_) : "all fusion groups";
    start_ns_ = now_ns();
    span_.emplace("update, ", name_);
  }
  void end() {
    if (name_.empty()) return;
    span_.reset();
    scheduler_->timeline().note("update", name_, start_ns_, now_ns());
  }

 private:
  const std::shared_ptr<Scheduler> scheduler_;
  const std::optional<size_t> group_;
  std::string name_;
  int64_t start_ns_ = 0;
  std::optional<ProfiledSpan> span_;
};

}  // namespace dear
