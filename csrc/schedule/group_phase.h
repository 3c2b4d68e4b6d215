#pragma once

#include "schedule/two_phase_exchange.h"

namespace dear {

// One half of a fusion group's exchange, as the scheduler sees it: dense, or made by a compressor.
class GroupPhase {
 public:
  virtual ~GroupPhase() = default;
  virtual void start() = 0;
  // Behind the start of all groups that are started together: what is to be done with the result.
  virtual void follow_up() {}
  virtual void wait() = 0;
  virtual bool done() = 0;
  virtual Phase phase() const = 0;
  virtual int64_t start_ns() const = 0;
  virtual int64_t end_ns() const = 0;
  // From when until when results of host tensors were decoded; zeros where nothing is.
  virtual std::pair<int64_t, int64_t> decoding() const { return {0, 0}; }
  // What this rank sends, where it is known beforehand; a pipeline counts its own.
  virtual int64_t bytes_sent() const = 0;
};

// The group's buckets as they are.
class DensePhase : public GroupPhase {
 public:
  DensePhase(std::shared_ptr<Lane> lane, std::shared_ptr<Exchange> exchange)
      : lane_(std::move(lane)), exchange_(std::move(exchange)) {}
  Exchange& exchange() { return *exchange_; }
  void start() override { lane_->submit(exchange_); }
  void wait() override { exchange_->wait(); }
  bool done() override { return exchange_->done(); }
  Phase phase() const override { return exchange_->phase(); }
  int64_t start_ns() const override { return exchange_->start_ns(); }
  int64_t end_ns() const override { return exchange_->end_ns(); }
  int64_t bytes_sent() const override { return exchange_->bytes_sent(); }

 private:
  const std::shared_ptr<Lane> lane_;
  const std::shared_ptr<Exchange> exchange_;
};

using TwoPhaseExchanges = std::vector<std::shared_ptr<TwoPhaseExchange>>;

// The first phase of a compressor, and the second.
class FirstPhase : public GroupPhase {
 public:
  explicit FirstPhase(TwoPhaseExchanges exchanges) : exchanges_(std::move(exchanges)) {}
  void start() override {
    for (const auto& exchange : exchanges_) exchange->start();
  }
  void wait() override {
    for (const auto& exchange : exchanges_) exchange->wait_first();
  }
  bool done() override {
    return std::all_of(exchanges_.begin(), exchanges_.end(),
                       [](const auto& exchange) { return exchange->first_done(); });
  }
  Phase phase() const override { return Phase::kReduceScatter; }
  int64_t start_ns() const override { return exchanges_.front()->first_start_ns(); }
  int64_t end_ns() const override { return exchanges_.back()->first_end_ns(); }
  int64_t bytes_sent() const override { return 0; }

 private:
  const TwoPhaseExchanges exchanges_;
};

class SecondPhase : public GroupPhase {
 public:
  explicit SecondPhase(TwoPhaseExchanges exchanges) : exchanges_(std::move(exchanges)) {}
  void start() override {
    for (const auto& exchange : exchanges_) exchange->start_last();
  }
  void follow_up() override {
    for (const auto& exchange : exchanges_) exchange->decode_when_awaited();
  }
  void wait() override {
    for (const auto& exchange : exchanges_) exchange->wait();
  }
  bool done() override {
    return std::all_of(exchanges_.begin(), exchanges_.end(),
                       [](const auto& exchange) { return exchange->done(); });
  }
  Phase phase() const override { return Phase::kAllGather; }
  int64_t start_ns() const override { return exchanges_.front()->last_start_ns(); }
  int64_t end_ns() const override { return exchanges_.back()->last_end_ns(); }
  std::pair<int64_t, int64_t> decoding() const override {
    return {exchanges_.front()->decode_start_ns(), exchanges_.back()->decode_end_ns()};
  }
  int64_t bytes_sent() const override { return 0; }

 private:
  const TwoPhaseExchanges exchanges_;
};

}  // namespace dear
