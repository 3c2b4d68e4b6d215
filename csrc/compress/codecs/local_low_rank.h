#pragma once

#include <vector>

#include "compress/codecs/low_rank.h"

namespace dear::compress {

// P of every batch, or Q, as one part of the row that each rank sends to all. P and Q are rounded apart from
// each other, since they differ in size, and elements that share a scale should not.
class GatheredFactors {
 public:
  // `like`: tensors of the factors' shapes. `wire`: the type in which factors travel; none for float32.
  GatheredFactors(const std::vector<at::Tensor>& like, int64_t world, std::optional<at::ScalarType> wire);

  // Of a row.
  int64_t words() const { return words_; }
  // This rank's, [B, n or m, r] by batch. Behind send() they are what the others will read.
  const std::vector<at::Tensor>& own() const { return own_; }
  // Writes them to this rank's part of the row, int32 [words].
  void send(const at::Tensor& row, const at::Tensor& dropped);
  // Reads the parts of all ranks' rows, int32 [ranks, words], which must stay until all() has been called.
  void receive(const at::Tensor& rows);
  // All ranks' factors of a batch, side by side: [B, n or m, ranks * r].
  at::Tensor all(size_t batch) const;

 private:
  const int64_t world_;
  std::unique_ptr<const FactorWire> wire_;  // null for float32
  at::Tensor values_;                       // [factors], of this rank
  std::vector<at::Tensor> own_;             // views of it
  std::vector<int64_t> begins_;             // there, by batch
  int64_t shard_;                           // elements of a row, some of them padding
  int64_t words_;
  at::Tensor received_;  // [ranks, shard]
};

// compress.LocalPowerSGD, whose docstring has the steps.
//
// Note [Factors of each rank]
// A rank's factors are its own here, and say what it sends of its own matrix: so they leave its error
// feedback once they are rounded, and nobody rounds anything again. All that a result is made of lies in the
// gathered rows, which are the outcome.
class LocalCodec : public LowRankCodec {
 public:
  LocalCodec(at::Device device, int64_t rank, int64_t world, std::vector<MatrixBatch> batches,
             at::Tensor segments, int64_t dense_numel, std::optional<at::ScalarType> wire);
  size_t stages(int64_t) const override { return 1; }
  std::optional<Message> advance(int64_t step, size_t stage) override;
  at::Tensor outcome(int64_t) const override { return gathered_.view(-1); }
  void read(int64_t step, const at::Tensor& outcome) override;

 private:
  // What lies in a row, or in all: this side's factors, the dense members in float32, how many elements were
  // dropped.
  at::Tensor p_of(const at::Tensor& rows) const { return rows.narrow(-1, 0, p_.words()); }
  at::Tensor q_of(const at::Tensor& rows) const { return rows.narrow(-1, p_.words(), q_.words()); }
  at::Tensor dense_of(const at::Tensor& rows) const;
  at::Tensor flag_of(const at::Tensor& rows) const;

  Message send();
  void receive(const at::Tensor& rows);
  void write_product(const MatrixBatch& batch, const at::Tensor& p, const at::Tensor& q) const;

  const int64_t rank_;
  const int64_t world_;
  GatheredFactors p_;
  GatheredFactors q_;
  at::Tensor dense_;     // [elements]: the mean
  at::Tensor gathered_;  // [ranks, words] int32
};

}  // namespace dear::compress
