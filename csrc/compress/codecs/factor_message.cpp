#include "compress/codecs/factor_message.h"

#include "collectives/shard.h"
#include "compress/layout.h"

namespace dear::compress {

namespace {

std::vector<at::Tensor> views(const at::Tensor& flat, const std::vector<at::Tensor>& like) {
  std::vector<at::Tensor> parts;
  int64_t start = 0;
  for (const at::Tensor& one : like) {
    parts.push_back(flat.narrow(0, start, one.numel()).view(one.sizes()));
    start += one.numel();
  }
  return parts;
}

// For each owner: its shard of [n] values in shards of that length, the last ones short or empty.
template <typename Use>
void by_owner(const at::Tensor& values, int64_t shard, int64_t world, Use use) {
  for (int64_t owner = 0; owner < world; ++owner) {
    const int64_t begin = std::min(owner * shard, values.numel());
    const int64_t size = std::min(shard, values.numel() - begin);
    if (size > 0) use(owner, values.narrow(0, begin, size), size);
  }
}

}  // namespace

FactorMessage::FactorMessage(const std::vector<at::Tensor>& like, int64_t dense_numel) {
  for (const at::Tensor& one : like) factor_numel_ += one.numel();
  flat_ = at::zeros({factor_numel_ + dense_numel + 1}, like.front().options());
  factors = views(flat_, like);
  dense = flat_.narrow(0, factor_numel_, dense_numel);
  flag = flat_.narrow(0, factor_numel_ + dense_numel, 1);
}

ExactFactors::ExactFactors(const std::vector<at::Tensor>& like, int64_t dense_numel, int64_t rank,
                           int64_t world)
    : FactorMessage(like, dense_numel) {
  const Shards shards{flat_.numel(), static_cast<int>(world)};
  shard_ = flat_.narrow(0, shards.begin(rank), shards.size(rank));
}

RoundedFactors::RoundedFactors(const std::vector<at::Tensor>& like, int64_t dense_numel, int64_t rank,
                               int64_t world, std::unique_ptr<const FactorWire> wire)
    : FactorMessage(like, dense_numel),
      rank_(rank),
      world_(world),
      wire_(std::move(wire)),
      factor_shard_(wire_->shard_numel(ceil_div(factor_numel_, world))),
      factor_words_(wire_->words(factor_shard_)),
      dense_shard_(ceil_div(dense_numel, world)) {
  const auto ints = flat_.options().dtype(at::kInt);
  values_ = flat_.narrow(0, 0, factor_numel_);
  said_ = at::zeros({factor_numel_}, flat_.options());
  shares_ = views(said_, like);
  const int64_t begin = std::min(rank * factor_shard_, factor_numel_);
  own_ = said_.narrow(0, begin, std::min(factor_shard_, factor_numel_ - begin));
  lost_ = at::zeros_like(own_);
  dropped_ = at::zeros({1}, ints);
  for (at::Tensor* rows : {&sent_, &received_, &gathered_}) {
    *rows = at::zeros({world_, factor_words_ + dense_shard_ + 1}, ints);
  }
}

at::Tensor RoundedFactors::factors_of(const at::Tensor& rows) const {
  return rows.narrow(-1, 0, factor_words_);
}

at::Tensor RoundedFactors::dense_of(const at::Tensor& rows) const {
  return rows.narrow(-1, factor_words_, dense_shard_).view(at::kFloat);
}

at::Tensor RoundedFactors::flag_of(const at::Tensor& rows) const {
  return rows.narrow(-1, factor_words_ + dense_shard_, 1);
}

Message RoundedFactors::send() {
  const at::Tensor exact = dense_of(sent_);
  wire_->encode(values_, factor_shard_, factors_of(sent_), dropped_);
  wire_->decode(factors_of(sent_), factor_shard_, said_);
  by_owner(dense, dense_shard_, world_, [&](int64_t owner, const at::Tensor& values, int64_t size) {
    exact.select(0, owner).narrow(0, 0, size).copy_(values);
  });
  flag_of(sent_).copy_(flag.expand({world_, 1}));
  return {Phase::kAllToAll, sent_.view(-1), received_.view(-1)};
}

Message RoundedFactors::forward() {
  const at::Tensor mine = gathered_.select(0, rank_);
  wire_->average(factors_of(received_), factor_shard_, factors_of(mine), lost_, dropped_);
  own_.sub_(lost_, static_cast<double>(world_));
  // No sum may overflow where the mean does not; see average_scale().
  const double scale = average_scale(world_);
  const at::Tensor mean = dense_of(mine), exact = dense_of(received_);
  mean.copy_(exact.select(0, 0)).mul_(scale);
  for (int64_t rank = 1; rank < world_; ++rank) mean.add_(exact.select(0, rank), scale);
  mean.div_(static_cast<double>(world_) * scale);
  at::Tensor flags = flag_of(mine);
  at::sum_out(flags, flag_of(received_), {0}, /*keepdim=*/false, at::kInt);
  return {Phase::kAllGather, gathered_.view(-1), {}};
}

void RoundedFactors::receive() {
  const at::Tensor exact = dense_of(gathered_);
  wire_->decode(factors_of(gathered_), factor_shard_, values_);
  by_owner(dense, dense_shard_, world_, [&](int64_t owner, at::Tensor values, int64_t size) {
    values.copy_(exact.select(0, owner).narrow(0, 0, size));
  });
  flag.copy_(flag_of(gathered_).sum());
}

}  // namespace dear::compress
