// Which stream waits for what, of all that this library queues on a GPU, without one: emulated_streams.h
// keeps the books. Run by `make streams`. Ends with 0 when every stream waits for what it must, and for no
// more.
#include <torch/csrc/autograd/variable.h>

#include <cstdio>
#include <cstdlib>
#include <functional>

#include "collectives/native.h"
#include "collectives/two_level.h"
#include "compress/codec.h"
#include "emulated_streams.h"
#include "schedule/compressed_hook.h"
#include "schedule/scheduler.h"

namespace {

using dear::Exchange;
using dear::Lane;
using dear::Phase;
using dear::Reduction;
using namespace emulated;

constexpr int64_t kNumel = 16;

void require(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(2);
}

// The works of its collectives are "NAME 0", "NAME 1" and so on.
std::shared_ptr<Lane> make_lane(const std::string& name, int world = 2, int rank = 0) {
  return std::make_shared<dear::NativeLane>(c10::make_intrusive<Group>(name, rank, world));
}

// Calls `deliver` as DDP calls its hook: inside a backward pass, on a stream that is not its caller's, behind
// which autograd puts the caller's before it runs what was queued for the end.
void backward(const std::function<void()>& deliver) {
  at::Tensor x = zeros(1).requires_grad_();
  x.register_hook([&](const at::Tensor&) {
    on(kBackward, deliver);
    follow(kTraining, kBackward);
  });
  x.sum().backward();
}

// --- an exchange of the backend's ---

std::shared_ptr<Exchange> make_reduction(Lane& lane, int64_t numel = kNumel) {
  return lane.make_exchange(Phase::kReduceScatter, Reduction::kAverage,
                            {{zeros(numel), zeros((numel + 1) / 2)}}, "x");
}

// Whoever waits, and however many do, each is behind the collective and what was made of its result by the
// first of them. Nobody else is.
void orders_whoever_waits() {
  for (const int64_t numel : {kNumel, kNumel - 1}) {  // the second through staging buffers
    reset();
    const auto lane = make_lane("reduce");
    const auto exchange = make_reduction(*lane, numel);
    run("gradients");
    lane->submit(exchange);
    require(came_behind("reduce 0", "gradients"), "a collective began before what it sends was there");
    require(!waits_for(kTraining, "reduce 0"), "who submits waits for the collective");
    on(kOther, [&] { exchange->wait(); });
    require(waits_for(kOther, "reduce 0"), "who waits first is not behind the collective");
    require(came_behind("aten::div_", "reduce 0"), "a mean was divided before its sum was there");
    for (const auto waiter : {kReader, kTraining}) {
      require(!waits_for(waiter, "reduce 0"), "who has not waited is behind the collective");
      on(waiter, [&] { exchange->wait(); });
      require(waits_for(waiter, "reduce 0"), "who waits later is not behind the collective");
      require(waits_for(waiter, "aten::div_"), "who waits later is not behind the division");
    }
  }
}

// A stream that waited for one submission is behind the next only when it waits again, in whatever turn.
void orders_anew_when_submitted_again() {
  reset();
  const auto lane = make_lane("reduce");
  const auto exchange = make_reduction(*lane);
  lane->submit(exchange);
  exchange->wait();
  on(kReader, [&] { exchange->wait(); });
  lane->submit(exchange);
  on(kOther, [&] { exchange->wait(); });
  require(waits_for(kOther, "reduce 1"), "who waits for the second submission is not behind it");
  require(!waits_for(kReader, "reduce 1"), "who waited for the first submission is behind the second");
  on(kReader, [&] { exchange->wait(); });
  exchange->wait();
  require(waits_for(kReader, "reduce 1") && waits_for(kTraining, "reduce 1"),
          "who waits later is not behind the second submission");
}

// One that became itself when its turn came, and one that became another exchange.
void orders_behind_what_was_deferred() {
  for (const bool another : {false, true}) {
    reset();
    const auto reduce = make_lane("reduce"), gather = make_lane("gather");
    const auto reduced = make_reduction(*reduce);
    const auto make = [&](std::vector<dear::Part> parts) {
      return gather->make_exchange(Phase::kAllGather, Reduction::kSum, std::move(parts), "x");
    };
    const at::Tensor full = zeros(kNumel);
    const dear::Part part{full, full.narrow(0, 0, kNumel / 2)};
    const auto moved = another ? make({part}) : nullptr;
    const auto gathered = another ? make({}) : make({part});
    gathered->defer([&] {
      reduced->wait();
      return moved;
    });
    for (const std::string step : {"0", "1"}) {
      reduce->submit(reduced);
      on(kBackward, [&] { gather->submit(gathered); });
      require(came_behind("gather " + step, "reduce " + step),
              "a deferred collective began before what it waits for had ended");
      require(!waits_for(kTraining, "reduce " + step), "who defers a wait waits itself");
      for (const auto waiter : {kOther, kReader, kTraining}) {
        on(waiter, [&] { gathered->wait(); });
        require(waits_for(waiter, "gather " + step), "who waits is not behind the deferred collective");
      }
    }
  }
}

// --- two levels ---

struct TwoLevels {
  std::shared_ptr<Lane> lane = std::make_shared<dear::TwoLevelLane>(make_lane("inside"), make_lane("between"),
                                                                    dear::Nodes{{0, 1}, {2, 3}});
};

void two_levels_hold_up_only_who_waits() {
  for (const Phase phase : {Phase::kReduceScatter, Phase::kAllGather}) {
    reset();
    const TwoLevels two;
    const auto exchange =
        two.lane->make_exchange(phase, Reduction::kSum, {{zeros(kNumel), zeros(kNumel / 4)}}, "x");
    const bool reduces = phase == Phase::kReduceScatter;
    for (const std::string step : {" 0", " 1"}) {
      run("before" + step);
      const Names before = ahead_of(kTraining);
      two.lane->submit(exchange);
      require(ahead_of(kTraining) == before, "who submits two levels waits for one");
      const std::string first = (reduces ? "inside" : "between") + step;
      const std::string second = (reduces ? "between" : "inside") + step;
      require(came_behind(first, "before" + step), "the first level began before what it sends was there");
      require(came_behind(second, first), "the second level began before the first had ended");
      on(kReader, [&] { exchange->wait(); });
      exchange->wait();
      for (const auto waiter : {kReader, kTraining})
        require(waits_for(waiter, first) && waits_for(waiter, second), "who waits is not behind both levels");
    }
  }
}

// Where the chunks of this place are empty, the second level has no work to wait for.
void an_empty_second_level_still_orders_behind_the_first() {
  reset();
  const TwoLevels two;
  using Ranges = std::vector<std::vector<dear::Range>>;
  const auto owners = std::make_shared<dear::Ownership>(kNumel, Ranges{{}, {{0, 8}}, {}, {{8, kNumel}}});
  const auto exchange = two.lane->make_exchange(Phase::kReduceScatter, Reduction::kSum,
                                                {{zeros(kNumel), zeros(0), owners}}, "x");
  two.lane->submit(exchange);
  require(has_run("inside 0") && !has_run("between 0"), "another level is empty than the second");
  exchange->wait();
  require(waits_for(kTraining, "inside 0"), "who waits is not behind the first level");
}

// --- the schedule ---

// A scheduler with one bucket, and what the engine does at the end of a backward pass.
struct Schedule {
  explicit Schedule(bool gathers_gradients)
      : scheduler(make_lane("reduce"), make_lane("gather"), gathers_gradients) {
    const at::Tensor full = gathers_gradients ? buffer.variable_data() : zeros(kNumel);
    scheduler.set_backward_ended([this, full](bool layout_is_new, bool) {
      if (layout_is_new)
        scheduler.adopt_layout({{full.narrow(0, 0, kNumel / 2), full, nullptr, {}}}, {}, {}, {1}, {0});
    });
  }
  ~Schedule() { scheduler.release(); }
  void pass(const std::string& step) {
    backward([&] {
      run("gradients" + step);
      scheduler.on_bucket(0, {buffer, {param}, {buffer.view(-1)}}, true);
    });
  }

  const at::Tensor buffer = zeros(kNumel);
  const at::Tensor param = zeros(kNumel);
  dear::Scheduler scheduler;
};

// Whoever waits first, on whatever stream: what training does next comes behind the exchange, too.
void training_follows_who_waits_elsewhere() {
  for (const bool gradients : {false, true}) {
    reset();
    Schedule schedule(gradients);
    for (const std::string step : {" 0", " 1"}) {
      schedule.pass(step);
      const auto wait_elsewhere = [&](const std::string& work, auto wait) {
        require(!waits_for(kTraining, work), "training waits for an exchange before anybody asks for it");
        on(kReader, wait);
        require(waits_for(kReader, work), "who touches a tensor first is not behind its exchange");
        require(waits_for(kTraining, work), "training goes on before what a reader has waited for");
      };
      if (!gradients) {
        wait_elsewhere("reduce" + step, [&] { schedule.scheduler.wait_reduced(0); });
        run("update" + step);
        schedule.scheduler.submit_gather(0, 0);
        require(came_behind("gather" + step, "update" + step), "parameters were sent before their update");
      }
      wait_elsewhere("gather" + step, [&] { schedule.scheduler.wait_gathered(0, 0); });
      require(came_behind("gather" + step, "reduce" + step), "an all-gather began before its reduce-scatter");
      require(came_behind("reduce" + step, "gradients" + step),
              "a bucket was sent before its gradients came");
    }
  }
}

// Training goes on where the update of the parameters ran, which may be elsewhere than backward() was called.
void training_is_where_parameters_were_updated() {
  reset();
  Schedule schedule(/*gathers_gradients=*/false);
  schedule.pass(" 0");
  on(kOther, [&] {
    schedule.scheduler.wait_reduced(0);
    schedule.scheduler.submit_gather(0, 0);
  });
  on(kReader, [&] { schedule.scheduler.wait_gathered(0, 0); });
  require(waits_for(kOther, "gather 0"),
          "the stream of the update goes on before what a reader has waited for");
}

// --- compression ---

// Sums compressed gradients, and gathers the compressed sums: "NAME encode 0" of step 0, and so on.
class Codec : public dear::compress::Codec {
 public:
  explicit Codec(std::string name) : dear::compress::Codec(kDevice), name_(std::move(name)) {}
  size_t stages(int64_t) const override { return 2; }
  std::optional<dear::compress::Message> advance(int64_t step, size_t stage) override {
    constexpr const char* kStages[] = {" encode ", " between ", " decode "};
    run(name_ + kStages[stage] + std::to_string(step));
    if (stage == 0) return dear::compress::Message{Phase::kReduceScatter, full_, shard_};
    if (stage == 1) return dear::compress::Message{Phase::kAllGather, full_, {}};
    return std::nullopt;
  }

 private:
  const std::string name_;
  const at::Tensor full_ = zeros(kNumel);
  const at::Tensor shard_ = zeros(kNumel / 2);
};

// As a codec of two levels is: two exchanges in either phase.
class LongCodec : public Codec {
 public:
  using Codec::Codec;
  size_t stages(int64_t) const override { return 4; }
  size_t first_stages(int64_t) const override { return 2; }
  std::optional<dear::compress::Message> advance(int64_t step, size_t stage) override {
    if (stage == 0 || stage == 4) return Codec::advance(step, stage / 2);
    return Codec::advance(step, 1);
  }
};

// Two groups of a bucket. Each is exchanged in the order of its making, so the works of group i in step s are
// "first 2s+i" and "last 2s+i".
struct Compression {
  Compression() {
    const std::vector<std::shared_ptr<Lane>> lanes{make_lane("first"), make_lane("last")};
    pipeline = std::make_shared<dear::Pipeline>(lanes, std::vector<std::shared_ptr<Lane>>{}, kDevice, 0);
    for (const std::string name : {"0", "1"}) {
      groups.push_back(std::make_shared<dear::TwoPhaseExchange>(pipeline, std::make_shared<Codec>(name), name,
                                                                std::vector<at::Tensor>{}, false));
      groups.back()->bind(bucket, bucket, name == "0" ? 0 : kNumel, kNumel, {});
    }
  }

  const at::Tensor bucket = zeros(2 * kNumel);
  std::shared_ptr<dear::Pipeline> pipeline;
  dear::TwoPhaseExchanges groups;
};

std::string number(int64_t step, int64_t group) { return " " + std::to_string(2 * step + group); }

void comes_in_order(int64_t step, int64_t group) {
  const std::string codec = std::to_string(group), of_step = std::to_string(step);
  const std::string order[] = {"gradients " + of_step,        codec + " encode " + of_step,
                               "first" + number(step, group), codec + " between " + of_step,
                               "last" + number(step, group),  codec + " decode " + of_step};
  for (size_t i = 0; i + 1 < std::size(order); ++i)
    require(came_behind(order[i + 1], order[i]), order[i + 1] + " does not come behind " + order[i]);
}

// Under DeAR a group is decoded when it is awaited, else at once.
void compresses_beside_the_caller() {
  for (const bool awaited : {false, true}) {
    reset();
    Compression all;
    for (const int64_t step : {0, 1}) {
      const std::string of_step = std::to_string(step);
      all.pipeline->begin_step();
      run("gradients " + of_step);
      for (const auto& group : all.groups) group->start();
      for (const auto& group : all.groups) group->start_last();
      for (const auto& group : all.groups) awaited ? group->decode_when_awaited() : group->start_decoding({});
      for (const int64_t index : {0, 1}) {
        const auto& group = all.groups[static_cast<size_t>(index)];
        const std::string decoding = std::to_string(index) + " decode " + of_step;
        const std::string encoding = std::to_string(index) + " encode " + of_step;
        require(!waits_for(kTraining, encoding), "who starts a compressed exchange waits for it");
        require(has_run(decoding) != awaited, "a group is decoded in another turn than it should");
        on(kOther, [&] { group->dropped(); });
        require(waits_for(kOther, encoding), "who reads what was dropped is not behind the encoding");
        require(!waits_for(kOther, "first" + number(step, index)),
                "who reads what was dropped waits for an exchange");
        on(kReader, [&] { group->wait(); });
        require(waits_for(kReader, decoding), "who waits is not behind the decoding");
        comes_in_order(step, index);
        require(!waits_for(kTraining, decoding), "who has not waited is behind the decoding");
      }
      require(!came_behind("1 encode " + of_step, "first" + number(step, 0)),
              "a group is encoded behind the exchange of another");
    }
    for (const std::string name : {"0", "1"})
      require(came_behind(name + " encode 1", name + " decode 0"),
              "a group's next step was encoded before this one had been decoded");
    for (const auto& group : all.groups) group->wait();
    require(waits_for(kTraining, "0 decode 1") && waits_for(kTraining, "1 decode 1"),
            "who waits later is not behind the decoding");
  }
}

// What a codec leaves for the second phase is queued there and in no other, all of it.
void a_phase_has_as_many_exchanges_as_the_codec_says() {
  reset();
  std::vector<std::shared_ptr<Lane>> lanes;
  for (const std::string name : {"one", "two", "three", "four"}) lanes.push_back(make_lane(name));
  const auto pipeline =
      std::make_shared<dear::Pipeline>(lanes, std::vector<std::shared_ptr<Lane>>{}, kDevice, 0);
  dear::TwoPhaseExchange group(pipeline, std::make_shared<LongCodec>("0"), "0", {}, false);
  const at::Tensor bucket = zeros(kNumel);
  group.bind(bucket, bucket, 0, kNumel, {});
  for (const std::string step : {"0", "1"}) {
    pipeline->begin_step();
    group.start();
    require(has_run("two " + step) && !has_run("three " + step),
            "the first phase is not what the codec says");
    on(kReader, [&] { group.wait_first(); });
    require(waits_for(kReader, "two " + step),
            "who waits for the first phase is not behind its last exchange");
    group.start_last();
    require(came_behind("four " + step, "three " + step), "an exchange of the second phase came too early");
    group.start_decoding({});
    group.wait();
    require(came_behind("0 decode " + step, "four " + step), "a group was decoded before its last exchange");
  }
}

// A bucket's future, which DDP waits for, is behind all of its groups, on whatever streams they were decoded.
void a_future_stands_for_all_groups() {
  reset();
  const auto all = std::make_shared<Compression>();
  dear::CompressedHook hook(all->pipeline, {[&](size_t, const dear::Bucket&) { return all->groups; },
                                            [](size_t) {}, [](const auto&) {}});
  for (const std::string step : {"0", "1"}) {
    c10::intrusive_ptr<c10::ivalue::Future> future;
    backward([&] {
      run("gradients " + step);
      future = hook.on_bucket(0, {all->bucket, {}, {}});
      for (const std::string group : {"0", "1"})
        require(!waits_for(kBackward, group + " encode " + step),
                "the backward pass waits for a bucket's exchange");
    });
    for (const std::string group : {"0", "1"})
      require(has_run(group + " decode " + step), "nothing was decoded");
    on(kReader, [&] { future->wait(); });
    for (const std::string group : {"0", "1"})
      require(waits_for(kReader, group + " decode " + step),
              "who waits for a future is not behind each group");
  }
}

// The same where gradients are compressed: whoever waits first has a group decoded, and training comes behind
// it.
void training_follows_who_waits_elsewhere_for_what_is_compressed() {
  reset();
  Compression all;
  dear::Scheduler scheduler(make_lane("reduce"), make_lane("gather"), /*gather_gradients=*/true);
  scheduler.set_pipeline(all.pipeline);
  scheduler.set_backward_ended([&](bool layout_is_new, bool) {
    const at::Tensor full = all.bucket.variable_data();
    if (layout_is_new)
      scheduler.adopt_layout({{full.narrow(0, 0, kNumel), full, nullptr, {}}}, {all.groups}, {}, {1}, {0});
  });
  backward([&] {
    run("gradients 0");
    scheduler.on_bucket(0, {all.bucket, {}, {}}, true);
  });
  for (const std::string group : {"0", "1"})
    require(!has_run(group + " decode 0"), "a group is decoded before anybody waits for it");
  on(kReader, [&] { scheduler.wait_gathered(0, 0); });
  for (const auto waiter : {kReader, kTraining})
    for (const std::string group : {"0", "1"})
      require(waits_for(waiter, group + " decode 0"), "training or a reader is not behind a decoding");
  for (const int64_t group : {0, 1}) comes_in_order(0, group);
  for (const std::string group : {"0", "1"})
    require(came_behind("gather 0", group + " encode 0"), "what was dropped was told too early");
  scheduler.release();
}

}  // namespace

int main() {
  install();
  orders_whoever_waits();
  orders_anew_when_submitted_again();
  orders_behind_what_was_deferred();
  two_levels_hold_up_only_who_waits();
  an_empty_second_level_still_orders_behind_the_first();
  training_follows_who_waits_elsewhere();
  training_is_where_parameters_were_updated();
  compresses_beside_the_caller();
  a_phase_has_as_many_exchanges_as_the_codec_says();
  a_future_stands_for_all_groups();
  training_follows_who_waits_elsewhere_for_what_is_compressed();
  std::puts("ok");
}
