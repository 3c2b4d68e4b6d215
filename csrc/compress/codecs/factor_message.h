#pragma once

#include <vector>

#include "compress/codec.h"
#include "compress/codecs/factor_wire.h"

namespace dear::compress {

// What is averaged over the ranks in one round of a low-rank compressor: factors, the members that travel
// dense, and how many elements were dropped.
class FactorMessage {
 public:
  virtual ~FactorMessage() = default;

  // Views of one flat float32 buffer: this rank's values before send(), the mean behind receive().
  std::vector<at::Tensor> factors;  // [B, n or m, r], by batch
  at::Tensor dense;                 // [elements]
  at::Tensor flag;                  // [1]; not zero behind receive() if any rank dropped anything

  virtual Message send() = 0;
  virtual Message forward() = 0;
  virtual void receive() {}
  // Whether send() is an all-to-all.
  virtual bool all_to_all() const { return false; }
  // Known behind forward(), where factors are rounded: what this rank's share of the mean
  // was, by batch. The mean of the shares is what all receive.
  const std::vector<at::Tensor>& shares() const { return shares_; }

 protected:
  FactorMessage(const std::vector<at::Tensor>& like, int64_t dense_numel);

  at::Tensor flat_;  // factors, dense, flag
  int64_t factor_numel_ = 0;
  std::vector<at::Tensor> shares_;
};

// In float32, by reduce-scatter and all-gather.
class ExactFactors : public FactorMessage {
 public:
  // `like`: tensors of the factors' shapes.
  ExactFactors(const std::vector<at::Tensor>& like, int64_t dense_numel, int64_t rank, int64_t world);
  Message send() override { return {Phase::kReduceScatter, flat_, shard_}; }
  Message forward() override { return {Phase::kAllGather, flat_, {}}; }

 private:
  at::Tensor shard_;
};

// Factors in fewer bits, the rest in float32: each owner sums its shard in float32, and rounds the mean once.
//
// Note [Rounded factors]
// A rank's factor is rounded as it is sent, and its owner rounds the mean again. Both are within the error
// feedback if it is told so: a rank's share of the mean is its rounded factor, and the owner of an element
// takes from its own share what the mean lost there, times the number of ranks. Then the shares sum up to
// what everybody received.
class RoundedFactors : public FactorMessage {
 public:
  RoundedFactors(const std::vector<at::Tensor>& like, int64_t dense_numel, int64_t rank, int64_t world,
                 std::unique_ptr<const FactorWire> wire);
  Message send() override;
  Message forward() override;
  void receive() override;
  bool all_to_all() const override { return true; }

 private:
  // A row: a shard of the factors, a shard of the dense members, how many elements were dropped.
  at::Tensor factors_of(const at::Tensor& rows) const;  // [..., words]
  at::Tensor dense_of(const at::Tensor& rows) const;    // [..., shard], float32
  at::Tensor flag_of(const at::Tensor& rows) const;     // [..., 1]

  const int64_t rank_;
  const int64_t world_;
  const std::unique_ptr<const FactorWire> wire_;
  const int64_t factor_shard_;  // elements
  const int64_t factor_words_;
  const int64_t dense_shard_;
  at::Tensor values_;   // [factors] of `flat_`
  at::Tensor said_;     // [factors]: the shares
  at::Tensor own_;      // of `said_`: what this rank owns
  at::Tensor lost_;     // [owned]: what rounding the mean lost
  at::Tensor dropped_;  // of rounding: never anything, since factors are limited
  at::Tensor sent_;     // [ranks, words] int32, as the other two
  at::Tensor received_;
  at::Tensor gathered_;
};

}  // namespace dear::compress
