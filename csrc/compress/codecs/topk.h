#pragma once

#include <vector>

#include "compress/codecs/owner.h"
#include "compress/layout.h"

namespace dear::compress {

// One selection of about k elements, of a rank's gradient or of an owner's merge. All on the device.
class Selection {
 public:
  // `stretch`: one run of elements of so many is sampled, or 0 where every selection is exact.
  Selection(at::Device device, int64_t numel, int64_t k, int64_t stretch);
  // Moves the k largest of grad + error into `slots`; `error` keeps the rest.
  void exact(const std::optional<at::Tensor>& grad, const at::Tensor& error, int64_t shard,
             const at::Tensor& slots);
  // Those above a threshold that is reused from step to step, for as long as it selects about k of a sample,
  // another one every step.
  void by_threshold(int64_t step, const at::Tensor& grad, const at::Tensor& error, int64_t shard,
                    const at::Tensor& slots);
  // Selected, and not finite and so dropped, in the last one: int32 [1].
  const at::Tensor& selected() const { return selected_; }
  const at::Tensor& dropped() const { return dropped_; }
  const at::Tensor& threshold() const { return threshold_; }

 private:
  at::Tensor sample(const at::Tensor& values, int64_t step, at::Tensor& kept) const;

  const int64_t k_;
  const int64_t stretch_;
  at::Tensor threshold_;  // float32 [1]
  at::Tensor ties_;
  at::Tensor stats_;  // the next two
  at::Tensor selected_;
  at::Tensor dropped_;
  at::Tensor workspace_;
  at::Tensor grad_sample_;
  at::Tensor error_sample_;
};

// compress.TopK, whose docstring has the equations.
class TopKCodec : public OwnerCodec {
 public:
  // `capacity`: entries in an owner's slot. `owner_k`: how many of its shard an owner sends. Without `error`
  // there is no feedback. `stretch`: see Selection.
  TopKCodec(at::Device device, int64_t rank, int64_t world, int64_t numel, int64_t shard, int64_t owned,
            int64_t k, int64_t owner_k, int64_t capacity, int64_t stretch, std::optional<at::Tensor> error,
            std::optional<at::Tensor> owner_error);

  // How many elements of this rank's gradient the last step selected, int32 [1], and by what threshold,
  // float32 [1], which the next step begins with.
  const at::Tensor& selected() const { return own_.selected(); }
  const at::Tensor& threshold() const { return own_.threshold(); }

 protected:
  void encode(int64_t step, const at::Tensor& rows) override;
  void merge(int64_t step, const at::Tensor& rows, const at::Tensor& merged) override;
  void decode(int64_t step, const at::Tensor& rows) override;

 private:
  // Zeros in place of the error feedback that there is not.
  void clear(at::Tensor& buffer, int64_t numel) const;

  const int64_t world_;
  const int64_t shard_;
  const int64_t owned_;
  const bool exact_;
  const bool feedback_;
  Selection own_;
  std::optional<Selection> merged_;  // none where the shard is empty
  at::Tensor error_;
  at::Tensor total_;  // the owner's error, or a buffer in its place
  at::Tensor slots_;  // [ranks, slot]: the kernels want slots in a run
  at::Tensor slot_;   // [1, slot]
};

}  // namespace dear::compress
