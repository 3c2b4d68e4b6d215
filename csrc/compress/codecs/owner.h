#pragma once

#include "compress/codec.h"
#include "compress/layout.h"

namespace dear::compress {

// A payload that cannot be summed on its way: each rank sends the owner of each shard a row of 32-bit words,
// the owner merges the rows of all ranks into one of its own, and sends that to all.
//
// Every row ends with a word that says how many elements were dropped as not finite, so that all ranks know.
class OwnerCodec : public Codec {
 public:
  size_t stages(int64_t) const override { return 2; }
  bool all_to_all(int64_t, size_t stage) const override { return stage == 0; }
  std::optional<Message> advance(int64_t step, size_t stage) override;
  at::Tensor outcome(int64_t) const override { return gathered_.view(-1); }
  void read(int64_t step, const at::Tensor& outcome) override;

 protected:
  OwnerCodec(at::Device device, int64_t rank, int64_t world, int64_t words);

  // A row's words, of which the first `words` are used, with which rows are whole vectors of 16 bytes.
  static int64_t whole_row(int64_t words) { return ceil_div(words + 1, 4) * 4 - 1; }

  // Writes the rows that go to the owners, [ranks, words] int32, and what it drops.
  virtual void encode(int64_t step, const at::Tensor& rows) = 0;
  // Writes this owner's row, [words], of what all ranks sent it, [ranks, words].
  virtual void merge(int64_t step, const at::Tensor& rows, const at::Tensor& merged) = 0;
  // Writes the result from all owners' rows, [ranks, words].
  virtual void decode(int64_t step, const at::Tensor& rows) = 0;

  at::Tensor int_buffer(at::IntArrayRef shape) const { return at::zeros(shape, sent_.options()); }

 private:
  at::Tensor sent_;  // [ranks, words + 1], as the other two
  at::Tensor received_;
  at::Tensor gathered_;
  at::Tensor sent_rows_;
  at::Tensor sent_flags_;
  at::Tensor received_rows_;
  at::Tensor received_flags_;
  at::Tensor gathered_rows_;
  at::Tensor merged_;
  at::Tensor merged_flag_;
};

}  // namespace dear::compress
