#pragma once

#include <ATen/ATen.h>

#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "collectives/exchange.h"

namespace dear::compress {

// What one exchange of a step moves: a Part, and how.
struct Message {
  Phase phase;
  at::Tensor full;
  at::Tensor shard;                                   // undefined for an all-gather
  std::shared_ptr<const Ownership> owners = nullptr;  // as of a Part
};

// What a compressor makes of one group's gradient.
//
// Note [Stages]
// advance(step, 0) encodes, and returns the first message; advance(step, s) works on what message s - 1
// brought, and returns message s; advance(step, stages) decodes, and returns nothing. How many there are
// depends on the step alone, and so is the same on every rank; so are the lengths of messages. Steps count
// from 0.
//
// Threads: one call at a time; the calls of one step may come from different threads.
class Codec {
 public:
  virtual ~Codec() = default;
  virtual size_t stages(int64_t step) const = 0;
  // How many of them go under the backward pass: those behind them may wait for the next forward pass.
  virtual size_t first_stages(int64_t step) const { return stages(step) - 1; }
  virtual std::optional<Message> advance(int64_t step, size_t stage) = 0;

  // Whether that message is an all-to-all; others are for the ring. Of the first one only a codec around this
  // one asks.
  virtual bool all_to_all(int64_t /*step*/, size_t /*stage*/) const { return false; }

  // From where and to where, both flat [n] of the gradient's type: this rank's gradient, which is only read,
  // and the aggregate. They may be one.
  virtual void bind(at::Tensor gradient, at::Tensor result) {
    gradient_ = std::move(gradient);
    result_ = std::move(result);
  }
  // How many elements of this rank's gradient were not finite: int32 [1], known once stage 0 is done.
  virtual at::Tensor dropped() const { return dropped_; }
  // Has an element that is not zero if a gradient was non-finite on any rank; known when the result is final.
  virtual at::Tensor nonfinite() const { return nonfinite_; }
  // Whether this step goes out compressed.
  virtual bool compresses(int64_t step) const { return true; }
  // Note [Outcomes]
  // Where the result is made of the last message alone, that message can stand for it: outcome() is its
  // buffer, flat, once the message has come, and read() makes the result of the outcome of a codec of equal
  // shape, on whatever rank. Else outcome() is undefined. Which it is depends on the step alone. Of a dense
  // step there is none, and read() is told once the result is where it is bound.
  virtual at::Tensor outcome(int64_t /*step*/) const { return {}; }
  virtual void read(int64_t /*step*/, const at::Tensor& /*outcome*/) {}
  // Takes up what another codec of the same group has learned, which it follows from this step on.
  virtual void follow(const Codec& /*before*/) {}
  // Learns from a dense step's result, flat [n] and equal on all ranks, behind which it begins.
  virtual void learn(const at::Tensor& /*result*/) {}
  // Makes the error feedback what it means, where a codec leaves part of it for the next step: to be called
  // before anybody else reads it, when nothing is in flight.
  virtual void settle() {}
  // Somebody has written the error feedback since the last step: what was left of it is void.
  virtual void forget() {}

 protected:
  explicit Codec(at::Device device)
      : dropped_(at::zeros({1}, at::TensorOptions().device(device).dtype(at::kInt))) {}

  at::Tensor gradient_;
  at::Tensor result_;
  at::Tensor dropped_;
  at::Tensor nonfinite_;
};

// Every element, as it is: the first steps, and groups that are not worth compressing.
class DenseCodec : public Codec {
 public:
  DenseCodec(at::Device device, int64_t rank, int64_t world) : Codec(device), rank_(rank), world_(world) {
    nonfinite_ = at::zeros_like(dropped_);
  }
  size_t stages(int64_t) const override { return 2; }
  std::optional<Message> advance(int64_t step, size_t stage) override;
  void bind(at::Tensor gradient, at::Tensor result) override;
  bool compresses(int64_t) const override { return false; }

 private:
  const int64_t rank_;
  const int64_t world_;
  at::Tensor shard_;
};

// The first step that goes out compressed, one number for all groups of a compressor. It may be changed
// between steps, to a step that has not begun.
class StartStep {
 public:
  explicit StartStep(int64_t step) : step_(step) {}
  int64_t get() const { return step_; }
  void set(int64_t step) { step_ = step; }

 private:
  std::atomic<int64_t> step_;
};

// A codec that compresses from a step on, until the next one does.
struct CodecStage {
  int64_t begin;
  std::shared_ptr<Codec> codec;
};

// Dense before `start`; then, of the compressed ones, that which began last. The first begins at step 0.
class StagedCodec : public Codec {
 public:
  StagedCodec(at::Device device, std::shared_ptr<const StartStep> start, std::shared_ptr<Codec> dense,
              std::vector<CodecStage> compressed);
  size_t stages(int64_t step) const override { return at(step)->stages(step); }
  size_t first_stages(int64_t step) const override { return at(step)->first_stages(step); }
  bool all_to_all(int64_t step, size_t stage) const override { return at(step)->all_to_all(step, stage); }
  std::optional<Message> advance(int64_t step, size_t stage) override;
  void bind(at::Tensor gradient, at::Tensor result) override;
  at::Tensor outcome(int64_t step) const override { return at(step)->outcome(step); }
  void read(int64_t step, const at::Tensor& outcome) override;
  at::Tensor dropped() const override { return now_->dropped(); }
  at::Tensor nonfinite() const override { return now_->nonfinite(); }
  bool compresses(int64_t step) const override { return at(step)->compresses(step); }
  void settle() override { now_->settle(); }
  void forget() override { now_->forget(); }

 private:
  const std::shared_ptr<Codec>& at(int64_t step) const;
  // Behind the last dense step, the codec of the next one learns from its result.
  void teach(int64_t step);

  const std::shared_ptr<const StartStep> start_;
  const std::shared_ptr<Codec> dense_;
  const std::vector<CodecStage> compressed_;
  std::shared_ptr<Codec> now_;
};

}  // namespace dear::compress
