#include "compress/codecs/local_low_rank.h"

#include <algorithm>

#include "compress/layout.h"
#include "compress/ops/low_rank.h"
#include "compress/ops/segments.h"

namespace dear::compress {

GatheredFactors::GatheredFactors(const std::vector<at::Tensor>& like, int64_t world,
                                 std::optional<at::ScalarType> wire)
    : world_(world), wire_(wire ? FactorWire::make(*wire) : nullptr) {
  int64_t numel = 0;
  for (const at::Tensor& one : like) {
    begins_.push_back(numel);
    numel += one.numel();
  }
  values_ = at::zeros({numel}, like.front().options());
  for (size_t batch = 0; batch < like.size(); ++batch) {
    const at::Tensor& one = like[batch];
    own_.push_back(values_.narrow(0, begins_[batch], one.numel()).view(one.sizes()));
  }
  shard_ = wire_ ? wire_->shard_numel(numel) : numel;
  words_ = wire_ ? wire_->words(shard_) : numel;
  if (wire_) received_ = at::zeros({world_, shard_}, values_.options());
}

void GatheredFactors::send(const at::Tensor& row, const at::Tensor& dropped) {
  if (!wire_) {
    row.view(at::kFloat).copy_(values_);
    return;
  }
  const at::Tensor rows = row.unsqueeze(0);  // as of one owner
  wire_->encode(values_, shard_, rows, dropped);
  wire_->decode(rows, shard_, values_);
}

void GatheredFactors::receive(const at::Tensor& rows) {
  if (wire_) {
    wire_->decode(rows, shard_, received_.view(-1));
  } else {
    received_ = rows.view(at::kFloat);
  }
}

at::Tensor GatheredFactors::all(size_t batch) const {
  const at::Tensor& own = own_[batch];
  const int64_t count = own.size(0), length = own.size(1), rank = own.size(2);
  const at::Tensor by_rank = received_.narrow(1, begins_[batch], own.numel());
  return by_rank.view({world_, count, length, rank})
      .permute({1, 2, 0, 3})
      .reshape({count, length, world_ * rank})
      .contiguous();  // of one matrix at rank 1, what is reshaped is a view still
}

LocalCodec::LocalCodec(at::Device device, int64_t rank, int64_t world, std::vector<MatrixBatch> batches,
                       at::Tensor segments, int64_t dense_numel, std::optional<at::ScalarType> wire)
    : LowRankCodec(device, rank, world, std::move(batches), std::move(segments), dense_numel, wire),
      rank_(rank),
      world_(world),
      p_(all_of(&MatrixBatch::p), world, wire),
      q_(all_of(&MatrixBatch::q), world, wire),
      dense_(at::zeros({dense_numel}, batches_.front().p.options())),
      gathered_(at::zeros({world, p_.words() + q_.words() + dense_numel + 1}, dropped_.options())) {
  nonfinite_ = flag_of(gathered_);
}

at::Tensor LocalCodec::dense_of(const at::Tensor& rows) const {
  return rows.narrow(-1, p_.words() + q_.words(), dense_.numel()).view(at::kFloat);
}

at::Tensor LocalCodec::flag_of(const at::Tensor& rows) const {
  return rows.narrow(-1, p_.words() + q_.words() + dense_.numel(), 1);
}

std::optional<Message> LocalCodec::advance(int64_t, size_t stage) {
  if (stage == 0) return send();
  receive(gathered_);
  return std::nullopt;
}

void LocalCodec::read(int64_t, const at::Tensor& outcome) { receive(outcome.view(gathered_.sizes())); }

Message LocalCodec::send() {
  const at::Tensor row = gathered_.select(0, rank_);
  dropped_.zero_();
  for (size_t i = 0; i < batches_.size(); ++i) {
    const at::Tensor& p = p_.own()[i];
    project(i, batches_[i].q, p, /*transposed=*/false, /*corrects=*/true);
    orthogonalize(i, p);
    project(i, p, q_.own()[i], /*transposed=*/true, /*corrects=*/false);
  }
  forget();
  p_.send(p_of(row), dropped_);
  q_.send(q_of(row), dropped_);
  for (size_t i = 0; i < batches_.size(); ++i) {
    batches_[i].p.copy_(p_.own()[i]);
    batches_[i].q.copy_(q_.own()[i]);
  }
  leave_pending(q_.own(), /*transposed=*/true);
  gather_dense(dense_of(row));
  flag_of(row).copy_(dropped_);
  return Message{Phase::kAllGather, gathered_.view(-1), {}};
}

void LocalCodec::receive(const at::Tensor& rows) {
  p_.receive(p_of(rows));
  q_.receive(q_of(rows));
  // Sums of the products are finite: Note [Overflow in low-rank factors].
  for (size_t i = 0; i < batches_.size(); ++i) write_product(batches_[i], p_.all(i), q_.all(i).div(world_));
  // No sum may overflow where the mean does not; see average_scale().
  const double scale = average_scale(world_);
  const at::Tensor exact = dense_of(rows);
  dense_.copy_(exact.select(0, 0)).mul_(scale);
  for (int64_t rank = 1; rank < world_; ++rank) dense_.add_(exact.select(0, rank), scale);
  dense_.div_(static_cast<double>(world_) * scale);
  scatter_dense(dense_);
  nonfinite_ = flag_of(rows);
}

// The matrices are P Q^T of all ranks' columns. The kernels take kMaxRank of them at a time.
void LocalCodec::write_product(const MatrixBatch& batch, const at::Tensor& p, const at::Tensor& q) const {
  const int64_t columns = p.size(2), each = kMaxRank / batch.p.size(2) * batch.p.size(2);
  if (columns <= each) return ops::low_rank_decode(p, q, result_, batch.starts);
  const int64_t count = p.size(0), numel = p.size(1) * q.size(1);
  const at::Tensor sum = at::zeros({count, p.size(1), q.size(1)}, p.options());
  for (int64_t first = 0; first < columns; first += each) {
    const int64_t some = std::min(each, columns - first);
    ops::low_rank_subtract(sum, p.narrow(2, first, some).contiguous(),
                           q.narrow(2, first, some).neg().contiguous(), std::nullopt);
  }
  const at::Tensor positions = at::arange(count, batch.starts.options()) * numel;
  const at::Tensor segments = at::stack({batch.starts, at::full_like(batch.starts, numel), positions}, 1);
  ops::scatter_segments(sum.view(-1), segments, result_);
}

}  // namespace dear::compress
