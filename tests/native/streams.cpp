// Which stream waits for what, of all that this library queues on a GPU, without one: emulated_streams.h
// keeps the books. Run by `make streams`. Ends with 0 when every stream waits for what it must, and for no
// more.
#include "streams.h"

#include "collectives/two_level.h"
#include "schedule/scheduler.h"

namespace streams {
namespace {

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

}  // namespace
}  // namespace streams

int main() {
  using namespace streams;
  install();
  orders_whoever_waits();
  orders_anew_when_submitted_again();
  orders_behind_what_was_deferred();
  two_levels_hold_up_only_who_waits();
  an_empty_second_level_still_orders_behind_the_first();
  training_follows_who_waits_elsewhere();
  training_is_where_parameters_were_updated();
  compression();
  std::puts("ok");
}
