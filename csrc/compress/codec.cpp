#include "compress/codec.h"

#include "collectives/shard.h"

namespace dear::compress {

void DenseCodec::bind(at::Tensor gradient, at::Tensor result) {
  Codec::bind(std::move(gradient), std::move(result));
  const Shards shards{result_.numel(), static_cast<int>(world_)};
  shard_ = result_.narrow(0, shards.begin(rank_), shards.size(rank_));
}

std::optional<Message> DenseCodec::advance(int64_t, size_t stage) {
  switch (stage) {
    case 0:
      dropped_.copy_(gradient_.isfinite().logical_not_().sum());
      return Message{Phase::kReduceScatter, gradient_, shard_};
    case 1:
      return Message{Phase::kAllGather, result_, {}};
    default:
      bad_ = result_.isfinite().all().logical_not_();
      return std::nullopt;
  }
}

}  // namespace dear::compress
