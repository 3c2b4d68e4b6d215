#pragma once

#include "compress/codec.h"

namespace dear::compress {

// A codec that works between nodes alone: see Note [Two levels] at TwoLevelLane. Members of a group are
// shared out among the places of a node.
//
//   first stage:  reduce-scatter inside the node: this place's members become the node's mean.
//   then:         the stages of `inner`, whose ranks are those of equal place, one in each node.
//   last stage:   all-gather of the results inside the node.
//
// So error feedback is of the node's mean, and exists once in a node. What `inner` counts as non-finite is
// known to the ranks of its place; the first of their results is made NaN, by which the whole node knows.
class TwoLevelCodec : public Codec {
 public:
  // `owners`: of the group's elements, by place; `place`: of this rank. `inner` works on this place's, one
  // range after another.
  TwoLevelCodec(at::Device device, std::shared_ptr<Codec> inner, std::shared_ptr<const Ownership> owners,
                int64_t place);
  size_t stages(int64_t step) const override { return inner_->stages(step) + 2; }
  bool all_to_all(int64_t step, size_t stage) const override {
    return stage > 0 && stage <= inner_->stages(step) && inner_->all_to_all(step, stage - 1);
  }
  std::optional<Message> advance(int64_t step, size_t stage) override;
  void bind(at::Tensor gradient, at::Tensor result) override;
  bool compresses(int64_t step) const override { return inner_->compresses(step); }
  void settle() override { inner_->settle(); }
  void forget() override { inner_->forget(); }

 private:
  void finish_inner();

  const std::shared_ptr<Codec> inner_;
  const std::shared_ptr<const Ownership> owners_;
  const int place_;
  at::Tensor mean_;  // of the node, of this place's members
  at::Tensor own_result_;
  at::Tensor first_;  // int64: where the results of each place begin that has some
  at::Tensor lost_;   // int32 [1]: what is not finite in this place's results, where `inner` does not say
};

}  // namespace dear::compress
