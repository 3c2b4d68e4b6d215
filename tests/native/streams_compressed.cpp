// The same of compressed gradients: part of the program of streams.cpp.
#include "compress/codec.h"
#include "schedule/compressed_hook.h"
#include "schedule/scheduler.h"
#include "streams.h"

namespace streams {
namespace {

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

void compression() {
  compresses_beside_the_caller();
  a_phase_has_as_many_exchanges_as_the_codec_says();
  a_future_stands_for_all_groups();
  training_follows_who_waits_elsewhere_for_what_is_compressed();
}

}  // namespace streams
