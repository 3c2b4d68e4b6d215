#pragma once

#include <ATen/record_function.h>
#include <c10/util/StringUtil.h>

#include <map>
#include <memory>
#include <optional>
#include <string>

#include "collectives/fork.h"

namespace dear {

// Whether a profiler of torch's looks at this thread.
inline bool profiled() { return at::hasCallbacks(); }

// A span on this thread, for torch's profiler. Where there is none it costs one branch, and no name is made.
class ProfiledSpan {
 public:
  template <typename... Parts>
  explicit ProfiledSpan(const Parts&... parts) {
    if (!profiled()) return;
    record_.emplace(at::RecordScope::USER_SCOPE);
    if (record_->isActive()) record_->before(c10::str("dear: ", parts...));
  }
  ProfiledSpan(const ProfiledSpan&) = delete;
  ProfiledSpan& operator=(const ProfiledSpan&) = delete;

 private:
  std::optional<at::RecordFunction> record_;
};

// Spans of lanes in a profiler's timeline, a row for each lane.
//
// Note [Profiled lanes]
// A profiler of torch's belongs to the thread that started it, and frees what spans have written as it stops.
// A span that is open on a lane's thread at that moment would be closed in freed memory, and the schedule
// leaves exchanges under way wherever a profiler may stop. So lanes only note times, as they always do, and
// whoever waits for an exchange reports it when it has ended: on the profiler's own thread, while it is on.
// A profiler has one row for each thread that reports to it, so each lane has a thread here, which does
// nothing else, from the first report on.
class ProfilerRows {
 public:
  ProfilerRows();
  ~ProfilerRows();
  // Called on a thread that is profiled; returns when the profiler knows. The times are those of now_ns();
  // what has none is left out.
  void report(const std::string& lane, const std::string& name, int64_t start_ns, int64_t end_ns);

 private:
  class Row;
  HomeOnly<std::map<std::string, std::unique_ptr<Row>>> rows_;  // by lane; see Note [Forked children]
};

}  // namespace dear
