#include "schedule/profiled.h"

#include <c10/util/ThreadLocalDebugInfo.h>
#include <pthread.h>
#include <torch/csrc/autograd/profiler_kineto.h>

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

#include "collectives/clock.h"
#include "collectives/exchange.h"

namespace dear {
namespace {

// What must be added to now_ns() to have the time of day, in which profilers count.
int64_t time_of_day_offset() {
  const auto today = std::chrono::system_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(today).count() - now_ns();
}

}  // namespace

// A thread that runs one job after another, while who gave it waits.
class ProfilerRows::Row {
 public:
  explicit Row(const std::string& name) {
    thread_ = std::thread([this] { serve(); });
    ::pthread_setname_np(thread_.native_handle(), name.substr(0, 15).c_str());  // the kernel keeps 15
  }
  ~Row() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  void run(std::function<void()> job) {
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = std::move(job);
    changed_.notify_all();
    changed_.wait(lock, [this] { return !job_; });
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return stopping_ || job_; });
      if (!job_) return;
      job_();
      job_ = nullptr;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::function<void()> job_;
  bool stopping_ = false;
  std::thread thread_;
};

ProfilerRows::ProfilerRows() = default;
ProfilerRows::~ProfilerRows() = default;

void ProfilerRows::report(const std::string& lane, const std::string& name, int64_t start_ns,
                          int64_t end_ns) {
  if (start_ns == 0 || end_ns < start_ns) return;
  // A profiler that looks at all threads at once takes no such reports.
  if (!c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::PROFILER_STATE)) return;
  auto& row = (*rows_.operator->())[lane];
  if (!row) row = std::make_unique<Row>(lane);
  const int64_t offset = time_of_day_offset();
  row->run([&, profiler = c10::ThreadLocalDebugInfo::current()] {
    const c10::DebugInfoGuard guard(profiler);
    torch::autograd::profiler::reportBackendEventToActiveKinetoProfiler(
        (start_ns + offset) / 1000, (end_ns + offset) / 1000, /*debug_handle=*/-1,
        at::RecordScope::USER_SCOPE, "dear: " + lane + ", " + name, "dear");
  });
}

}  // namespace dear
