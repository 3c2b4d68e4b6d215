#include "compress/codecs/two_level.h"

#include <limits>

#include "compress/ops/finite.h"

namespace dear::compress {

TwoLevelCodec::TwoLevelCodec(at::Device device, std::shared_ptr<Codec> inner,
                             std::shared_ptr<const Ownership> owners, int64_t place)
    : Codec(device), inner_(std::move(inner)), owners_(std::move(owners)), place_(static_cast<int>(place)) {
  std::vector<int64_t> first;
  for (int each = 0; each < owners_->world(); ++each) {
    if (owners_->size(each) > 0) first.push_back(owners_->ranges(each).front().begin);
  }
  first_ = at::tensor(first, at::kLong).to(device);
  lost_ = at::zeros_like(dropped_);
}

void TwoLevelCodec::bind(at::Tensor gradient, at::Tensor result) {
  Codec::bind(std::move(gradient), std::move(result));
  if (!mean_.defined()) {
    mean_ = at::empty({owners_->size(place_)}, gradient_.options());
    own_result_ = at::empty_like(mean_);
    inner_->bind(mean_, own_result_);
  }
}

std::optional<Message> TwoLevelCodec::advance(int64_t step, size_t stage) {
  const size_t between = inner_->stages(step);
  if (stage == 0) {
    ops::count_nonfinite(gradient_, dropped_);
    return Message{Phase::kReduceScatter, gradient_, mean_, owners_};
  }
  if (stage <= between) return inner_->advance(step, stage - 1);
  if (stage == between + 1) {
    inner_->advance(step, between);
    finish_inner();
    return Message{Phase::kAllGather, result_, {}, owners_};
  }
  nonfinite_ = result_.index_select(0, first_).isfinite().logical_not_();
  return std::nullopt;
}

// Without a look at the device, on a GPU.
void TwoLevelCodec::finish_inner() {
  if (mean_.numel() == 0) return;
  at::Tensor lost = inner_->nonfinite();
  if (!lost.defined()) {
    ops::count_nonfinite(own_result_, lost_);
    lost = lost_;
  }
  own_result_.narrow(0, 0, 1).masked_fill_(lost.ne(0).any(), std::numeric_limits<double>::quiet_NaN());
  for (const Range& range : owners_->ranges(place_)) {
    result_.narrow(0, range.begin, range.size()).copy_(own_result_.narrow(0, range.at, range.size()));
  }
}

}  // namespace dear::compress
