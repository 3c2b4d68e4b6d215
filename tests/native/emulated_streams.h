// Streams without a GPU, on torch's meta device, whose tensors have no memory and whose operators do nothing.
// What a device would promise is kept in books instead: for each stream, behind what its next work comes. A
// process group that works as NCCL's does, on a stream of its own, stands for the network. So whoever orders
// streams can be asked who waits for whom, and also who waits for nobody, which no GPU would tell.
//
// Everything runs on one thread, that of main(): also backward passes, since autograd has no thread for this
// device.
#pragma once

#include <ATen/ATen.h>
#include <ATen/record_function.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <map>
#include <memory>
#include <set>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>
#include <vector>

namespace emulated {

using Names = std::set<std::string>;

inline const c10::Device kDevice(c10::kMeta, 0);

// Streams by number; those above are handed out.
constexpr c10::StreamId kTraining = 1;
constexpr c10::StreamId kBackward = 2;
constexpr c10::StreamId kReader = 3;
constexpr c10::StreamId kOther = 4;
constexpr c10::StreamId kFirstOfPool = 100;

struct Books {
  std::map<c10::StreamId, Names> streams;  // by stream: behind what its next work comes
  std::map<std::string, Names> works;      // by work: behind what it came
  c10::StreamId current = kTraining;
  c10::StreamId next = kFirstOfPool;
};

inline Books& books() {
  static Books books;
  return books;
}

// Forgets everything, as each case does first.
inline void reset() { books() = Books{}; }

inline c10::Stream stream(c10::StreamId id) { return c10::Stream(c10::Stream::UNSAFE, kDevice, id); }

// Queues a piece of work on the current stream.
inline void run(const std::string& work) {
  Names& stream = books().streams[books().current];
  books().works[work] = stream;
  stream.insert(work);
}

// Does something while that stream is the current one.
template <typename Work>
void on(c10::StreamId id, Work work) {
  const c10::StreamGuard guard(stream(id));
  work();
}

// Orders one stream behind what another one has queued.
inline void follow(c10::StreamId later, c10::StreamId earlier) {
  const Names& before = books().streams[earlier];
  books().streams[later].insert(before.begin(), before.end());
}

// Behind what the next work of that stream comes.
inline const Names& ahead_of(c10::StreamId id) { return books().streams[id]; }
inline bool waits_for(c10::StreamId id, const std::string& work) { return ahead_of(id).count(work) > 0; }
inline bool has_run(const std::string& work) { return books().works.count(work) > 0; }
// Whether that work was queued, and behind the earlier one.
inline bool came_behind(const std::string& work, const std::string& earlier) {
  const auto found = books().works.find(work);
  return found != books().works.end() && found->second.count(earlier) > 0;
}

// An event is what its stream had before it when it was recorded.
class Guard : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return c10::kMeta; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return stream(books().current); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(books().next++); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    return stream(std::exchange(books().current, next.id()));
  }
  void record(void** event, const c10::Stream& on, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    if (!*event) *event = new Names;
    *static_cast<Names*>(*event) = books().streams[on.id()];
  }
  // What was never recorded holds up nobody.
  void block(void* event, const c10::Stream& on) const override {
    if (!event) return;
    const Names& before = *static_cast<Names*>(event);
    books().streams[on.id()].insert(before.begin(), before.end());
  }
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Names*>(event);
  }
};

// torch's own says "meta" without an index, and a future refuses a device that has none.
class Allocator : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t) override { return {nullptr, kDevice}; }
  void copy_data(void*, const void*, std::size_t) const override {}
};

// Operators that write in place are work of the current stream, by their names: "aten::div_". What is
// computed for an exchange where it is waited for is seen so.
inline std::unique_ptr<at::ObserverContext> note_operator(const at::RecordFunction& called) {
  const std::string name = called.name();
  if (!name.empty() && name.back() == '_') run(name);
  return nullptr;
}

// To be called once, before the first tensor.
inline void install() {
  static const Guard guard;
  static Allocator allocator;
  const c10::impl::DeviceGuardImplRegistrar registered(c10::kMeta, &guard);
  c10::SetAllocator(c10::kMeta, &allocator, /*priority=*/255);
  at::addGlobalCallback(at::RecordFunctionCallback(&note_operator).scopes({at::RecordScope::FUNCTION}));
}

inline at::Tensor zeros(int64_t numel) {
  return at::zeros({numel}, at::TensorOptions().device(kDevice).dtype(at::kFloat));
}

// As that of ProcessGroupNCCL: wait() orders the current stream behind the work, and no host waits.
class Work : public c10d::Work {
 public:
  explicit Work(Names done) : done_(std::move(done)) {}
  bool wait(std::chrono::milliseconds) override {
    books().streams[books().current].insert(done_.begin(), done_.end());
    return true;
  }
  bool isCompleted() override { return true; }

 private:
  const Names done_;  // once this work has ended
};

// Is only asked for its name, and for what it can.
class Backend : public c10d::Backend {
 public:
  using c10d::Backend::Backend;
  const std::string getBackendName() const override { return "emulated"; }
};

// Its collectives are the works "NAME 0", "NAME 1" and so on, in the order of the calls.
class Group : public c10d::ProcessGroup {
 public:
  Group(std::string name, int rank, int world)
      : c10d::ProcessGroup(rank, world), name_(std::move(name)), stream_(books().next++) {
    setBackend(c10::kMeta, BackendType::CUSTOM, c10::make_intrusive<Backend>(rank, world));
  }

  c10::intrusive_ptr<c10d::Work> broadcast(std::vector<at::Tensor>&, const c10d::BroadcastOptions&) override {
    return issue();
  }
  c10::intrusive_ptr<c10d::Work> reduce(std::vector<at::Tensor>&, const c10d::ReduceOptions&) override {
    return issue();
  }
  c10::intrusive_ptr<c10d::Work> alltoall_base(at::Tensor&, at::Tensor&, std::vector<int64_t>&,
                                               std::vector<int64_t>&, const c10d::AllToAllOptions&) override {
    return issue();
  }
  // A torch of 2.11 to 2.15 has the names of one of these pairs, or both: so none says that it overrides.
  virtual c10::intrusive_ptr<c10d::Work> reduce_scatter_single(at::Tensor&, at::Tensor&,
                                                               const c10d::ReduceScatterOptions&) {
    return issue();
  }
  virtual c10::intrusive_ptr<c10d::Work> _reduce_scatter_base(at::Tensor&, at::Tensor&,
                                                              const c10d::ReduceScatterOptions&) {
    return issue();
  }
  virtual c10::intrusive_ptr<c10d::Work> all_gather_single(at::Tensor&, at::Tensor&,
                                                           const c10d::AllgatherOptions&) {
    return issue();
  }
  virtual c10::intrusive_ptr<c10d::Work> _allgather_base(at::Tensor&, at::Tensor&,
                                                         const c10d::AllgatherOptions&) {
    return issue();
  }

 private:
  // On the group's own stream, behind the caller's.
  c10::intrusive_ptr<c10d::Work> issue() {
    follow(stream_, books().current);
    on(stream_, [&] { run(name_ + " " + std::to_string(calls_++)); });
    return c10::make_intrusive<Work>(ahead_of(stream_));
  }

  const std::string name_;
  const c10::StreamId stream_;
  int calls_ = 0;
};

}  // namespace emulated
