#include "compress/codecs/owner.h"

namespace dear::compress {

OwnerCodec::OwnerCodec(at::Device device, int64_t rank, int64_t world, int64_t words) : Codec(device) {
  const auto options = at::TensorOptions().device(device).dtype(at::kInt);
  sent_ = at::zeros({world, words + 1}, options);
  received_ = at::zeros({world, words + 1}, options);
  gathered_ = at::zeros({world, words + 1}, options);
  sent_rows_ = sent_.narrow(1, 0, words);
  sent_flags_ = sent_.select(1, words);
  received_rows_ = received_.narrow(1, 0, words);
  received_flags_ = received_.select(1, words);
  gathered_rows_ = gathered_.narrow(1, 0, words);
  merged_ = gathered_rows_.select(0, rank);
  merged_flag_ = gathered_.select(0, rank).narrow(0, words, 1);
  nonfinite_ = gathered_.select(1, words);
}

std::optional<Message> OwnerCodec::advance(int64_t step, size_t stage) {
  switch (stage) {
    case 0:
      dropped_.zero_();
      encode(step, sent_rows_);
      sent_flags_.copy_(dropped_);
      return Message{Phase::kAllToAll, sent_.view(-1), received_.view(-1)};
    case 1:
      dropped_.zero_();  // from here on: what this rank drops as the owner of a shard
      merge(step, received_rows_, merged_);
      at::sum_out(merged_flag_, received_flags_, {0}, /*keepdim=*/true, at::kInt);
      merged_flag_.add_(dropped_);
      return Message{Phase::kAllGather, gathered_.view(-1), {}};
    default:
      decode(step, gathered_rows_);
      return std::nullopt;
  }
}

void OwnerCodec::read(int64_t step, const at::Tensor& outcome) {
  const at::Tensor all = outcome.view(gathered_.sizes());
  decode(step, all.narrow(1, 0, gathered_rows_.size(1)));
  nonfinite_ = all.select(1, gathered_rows_.size(1));
}

}  // namespace dear::compress
