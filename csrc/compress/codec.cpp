#include "compress/codec.h"

#include "collectives/shard.h"
#include "compress/ops/finite.h"

namespace dear::compress {

void DenseCodec::bind(at::Tensor gradient, at::Tensor result) {
  Codec::bind(std::move(gradient), std::move(result));
  const Shards shards{result_.numel(), static_cast<int>(world_)};
  shard_ = result_.narrow(0, shards.begin(rank_), shards.size(rank_));
}

std::optional<Message> DenseCodec::advance(int64_t, size_t stage) {
  switch (stage) {
    case 0:
      ops::count_nonfinite(gradient_, dropped_);
      return Message{Phase::kReduceScatter, gradient_, shard_};
    case 1:
      return Message{Phase::kAllGather, result_, {}};
    default:
      ops::count_nonfinite(result_, nonfinite_);
      return std::nullopt;
  }
}

StagedCodec::StagedCodec(at::Device device, std::shared_ptr<const StartStep> start,
                         std::shared_ptr<Codec> dense, std::vector<CodecStage> compressed)
    : Codec(device),
      start_(std::move(start)),
      dense_(std::move(dense)),
      compressed_(std::move(compressed)),
      now_(dense_) {
  TORCH_CHECK(!compressed_.empty() && compressed_.front().begin == 0,
              "The first compressed codec must begin at step 0.");
}

const std::shared_ptr<Codec>& StagedCodec::at(int64_t step) const {
  if (step < start_->get()) return dense_;
  size_t index = 0;
  while (index + 1 < compressed_.size() && compressed_[index + 1].begin <= step) ++index;
  return compressed_[index].codec;
}

void StagedCodec::bind(at::Tensor gradient, at::Tensor result) {
  Codec::bind(gradient, result);
  dense_->bind(gradient, result);
  for (const CodecStage& stage : compressed_) stage.codec->bind(gradient, result);
}

std::optional<Message> StagedCodec::advance(int64_t step, size_t stage) {
  const std::shared_ptr<Codec>& codec = at(step);
  if (stage == 0 && codec != now_) {
    now_->settle();
    codec->follow(*now_);
    now_ = codec;
  }
  auto message = codec->advance(step, stage);
  if (!message) teach(step);
  return message;
}

void StagedCodec::read(int64_t step, const at::Tensor& outcome) {
  now_ = at(step);
  now_->read(step, outcome);
  teach(step);
}

void StagedCodec::teach(int64_t step) {
  if (now_ == dense_ && step + 1 == start_->get()) at(step + 1)->learn(result_);
}

}  // namespace dear::compress
