#pragma once

#include <vector>

#include "compress/codec.h"

namespace dear::compress {

// A codec that works between nodes alone: see Note [Two levels] at TwoLevelLane. Members of a group are
// shared out among the places of a node.
//
//   first stage:  reduce-scatter inside the node: this place's members become the node's mean.
//   then:         the stages of `inner`, whose ranks are those of equal place, one in each node; where it has
//                 fewer than it may have, nothing is sent in the others, since each stage has a lane.
//   last stage:   all-gather inside the node: of the places' outcomes (Note [Outcomes]), which every rank
//                 then reads, or else of their results.
//
// So error feedback is of the node's mean, and exists once in a node. What `inner` counts as non-finite is
// known to the ranks of its place. An outcome says so to the whole node; where results are gathered, the
// first of them is made NaN.
class TwoLevelCodec : public Codec {
 public:
  // `owners`: of the group's elements, by place; `place`: of this rank. `inner` works on this place's, one
  // range after another. `readers`: of each place a codec like its `inner`, which only reads; null for this
  // place and for those that own nothing. Without readers results are gathered.
  // `between`: the most stages that `inner` may have.
  TwoLevelCodec(at::Device device, std::shared_ptr<Codec> inner, std::shared_ptr<const Ownership> owners,
                int64_t place, std::vector<std::shared_ptr<Codec>> readers, int64_t between);
  size_t stages(int64_t) const override { return between_ + 2; }
  // All but `inner`'s last one and what is behind it. Ranks of other places may count otherwise: with them
  // this one shares the first and the last lane alone.
  size_t first_stages(int64_t step) const override { return inner_->first_stages(step) + 1; }
  bool all_to_all(int64_t step, size_t stage) const override {
    return stage > 0 && stage <= inner_->stages(step) && inner_->all_to_all(step, stage - 1);
  }
  std::optional<Message> advance(int64_t step, size_t stage) override;
  void bind(at::Tensor gradient, at::Tensor result) override;
  bool compresses(int64_t step) const override;  // also where this place owns nothing: its readers learn
  void settle() override { inner_->settle(); }
  void forget() override { inner_->forget(); }

 private:
  at::Tensor room_for(size_t place);
  void put(size_t place);
  void take(size_t place);
  void show_results(int64_t step);
  Message gather_results(int64_t step);
  Message gather_outcomes(int64_t step);
  void read_outcomes(int64_t step);
  std::vector<at::Tensor> outcomes(int64_t step) const;

  const std::shared_ptr<Codec> inner_;
  const std::shared_ptr<const Ownership> owners_;
  const size_t place_;
  const std::vector<std::shared_ptr<Codec>> readers_;
  const size_t between_;
  at::Tensor mean_;                 // of the node, of this place's members
  std::vector<at::Tensor> values_;  // by place: its results, within result_ where they lie in one run
  at::Tensor first_;                // int64: where the results of each place begin that has some
  at::Tensor lost_;                 // int32 [1]: what is not finite in results whose codec does not say
  bool reads_ = false;              // this step
  at::Tensor node_;                 // int32: the places' outcomes, one after another
  std::shared_ptr<const Ownership> parts_;
};

}  // namespace dear::compress
