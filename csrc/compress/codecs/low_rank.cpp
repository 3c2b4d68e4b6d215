#include "compress/codecs/low_rank.h"

#include "collectives/shard.h"
#include "compress/layout.h"
#include "compress/ops/low_rank.h"
#include "compress/ops/segments.h"

namespace dear::compress {

LowRankCodec::LowRankCodec(at::Device device, int64_t rank, int64_t world, std::vector<MatrixBatch> batches,
                           at::Tensor segments, int64_t dense_numel, std::optional<at::ScalarType> wire)
    : Codec(device),
      batches_(std::move(batches)),
      rank_(rank),
      world_(world),
      segments_(std::move(segments)),
      dense_numel_(dense_numel),
      wire_(wire) {
  for (const MatrixBatch& batch : batches_) {
    const int64_t count = batch.p.size(0), rows = batch.p.size(1), columns = batch.q.size(1);
    corrected_.push_back(batch.error.value_or(at::Tensor()));
    own_p_.push_back(at::zeros_like(batch.p));
    own_q_.push_back(at::zeros_like(batch.q));
    const int64_t numel = std::max(orthogonalize_workspace_numel(count, rows, batch.p.size(2)),
                                   orthogonalize_workspace_numel(count, columns, batch.p.size(2)));
    workspace_.push_back(at::zeros({numel}, batch.p.options().dtype(at::kDouble)));
  }
}

std::unique_ptr<FactorMessage> LowRankCodec::make_message(const std::vector<at::Tensor>& like,
                                                          bool with_dense) const {
  const int64_t numel = with_dense ? dense_numel_ : 0;
  if (wire_) return std::make_unique<RoundedFactors>(like, numel, rank_, world_, FactorWire::make(*wire_));
  return std::make_unique<ExactFactors>(like, numel, rank_, world_);
}

std::vector<at::Tensor> LowRankCodec::all_of(at::Tensor MatrixBatch::* factor) const {
  std::vector<at::Tensor> factors;
  for (const MatrixBatch& batch : batches_) factors.push_back(batch.*factor);
  return factors;
}

void LowRankCodec::follow(const Codec& before) {
  const auto* other = dynamic_cast<const LowRankCodec*>(&before);
  if (other == nullptr) return;
  for (size_t i = 0; i < batches_.size(); ++i) {
    const MatrixBatch& from = other->batches_[i];
    const int64_t columns = std::min(batches_[i].p.size(2), from.p.size(2));
    batches_[i].p.narrow(2, 0, columns).copy_(from.p.narrow(2, 0, columns));
    batches_[i].q.narrow(2, 0, columns).copy_(from.q.narrow(2, 0, columns));
  }
}

void LowRankCodec::learn(const at::Tensor& result) {
  constexpr int kIterations = 2;
  for (size_t i = 0; i < batches_.size(); ++i) {
    const MatrixBatch& batch = batches_[i];
    // A buffer for this one step: the error feedback must stay as it is.
    const at::Tensor matrices =
        at::zeros({batch.p.size(0), batch.p.size(1), batch.q.size(1)}, batch.p.options());
    ops::OptionalTensor gradient = result, starts = batch.starts;
    for (int iteration = 0; iteration < kIterations; ++iteration) {
      ops::low_rank_project(gradient, matrices, batch.q, batch.p, starts, false, false, std::nullopt);
      gradient = starts = std::nullopt;  // it is in the matrices now
      orthogonalize(i, batch.p);
      ops::low_rank_project(gradient, matrices, batch.p, batch.q, starts, true, false, std::nullopt);
    }
  }
}

void LowRankCodec::orthogonalize(size_t batch, const at::Tensor& factors) const {
  const int64_t numel = orthogonalize_workspace_numel(factors.size(0), factors.size(1), factors.size(2));
  ops::orthogonalize(factors, workspace_[batch].narrow(0, 0, numel));
}

// Of a codec that only reads, the buffer is never made.
void LowRankCodec::clear(size_t batch) {
  const MatrixBatch& own = batches_[batch];
  at::Tensor& buffer = corrected_[batch];
  if (!buffer.defined()) {
    buffer = at::empty({own.p.size(0), own.p.size(1), own.q.size(1)}, own.p.options());
  }
  buffer.zero_();
}

void LowRankCodec::project(size_t batch, const at::Tensor& fixed, const at::Tensor& factor, bool transposed,
                           bool corrects) {
  const MatrixBatch& own = batches_[batch];
  ops::OptionalTensor gradient, starts, pending_p, pending_q;
  if (corrects) {
    gradient = gradient_;
    starts = own.starts;
    if (!own.error) clear(batch);
    if (pending_ != Pending::kNone) {
      pending_p = pending_ == Pending::kOwnP ? own_p_[batch] : own.p;
      pending_q = pending_ == Pending::kOwnP ? own.q : own_q_[batch];
    }
  }
  ops::low_rank_project(gradient, corrected_[batch], fixed, factor, starts, transposed, /*residual=*/false,
                        dropped_, pending_p, pending_q);
}

void LowRankCodec::leave_pending(const std::vector<at::Tensor>& own, bool transposed) {
  if (!batches_.front().error) return;
  for (size_t i = 0; i < batches_.size(); ++i) (transposed ? own_q_ : own_p_)[i].copy_(own[i]);
  pending_ = transposed ? Pending::kOwnQ : Pending::kOwnP;
}

void LowRankCodec::settle() {
  for (size_t i = 0; i < batches_.size() && pending_ != Pending::kNone; ++i) {
    const bool own_p = pending_ == Pending::kOwnP;
    ops::low_rank_subtract(corrected_[i], own_p ? own_p_[i] : batches_[i].p,
                           own_p ? batches_[i].q : own_q_[i], std::nullopt);
  }
  pending_ = Pending::kNone;
}

void LowRankCodec::gather_dense(const at::Tensor& dense) {
  ops::gather_segments(gradient_, segments_, dense, dropped_);
}

void LowRankCodec::scatter_dense(const at::Tensor& dense) {
  ops::scatter_segments(dense, segments_, result_);
}

void LowRankCodec::put_dense(const FactorMessage& message) {
  gather_dense(message.dense);
  message.flag.copy_(dropped_);
}

void LowRankCodec::write_result(const FactorMessage& message) {
  for (const MatrixBatch& batch : batches_) ops::low_rank_decode(batch.p, batch.q, result_, batch.starts);
  scatter_dense(message.dense);
}

AcpCodec::AcpCodec(at::Device device, int64_t rank, int64_t world, std::vector<MatrixBatch> batches,
                   at::Tensor segments, int64_t dense_numel, std::optional<at::ScalarType> wire,
                   std::shared_ptr<const StartStep> start)
    : LowRankCodec(device, rank, world, std::move(batches), std::move(segments), dense_numel, wire),
      start_(std::move(start)),
      of_p_(make_message(all_of(&MatrixBatch::p), true)),
      of_q_(make_message(all_of(&MatrixBatch::q), true)) {}

std::optional<Message> AcpCodec::advance(int64_t step, size_t stage) {
  const bool odd = (step - start_->get()) % 2 == 0;  // the paper counts from 1
  FactorMessage& message = odd ? *of_p_ : *of_q_;
  switch (stage) {
    case 0:
      dropped_.zero_();
      for (size_t i = 0; i < batches_.size(); ++i) {
        const at::Tensor& fixed = odd ? batches_[i].q : batches_[i].p;
        orthogonalize(i, fixed);
        project(i, fixed, message.factors[i], !odd, /*corrects=*/true);
      }
      rounds() ? forget() : leave_pending(message.factors, !odd);
      put_dense(message);
      return message.send();
    case 1:
      return message.forward();
    default:
      message.receive();
      nonfinite_ = message.flag;
      if (rounds()) leave_pending(message.shares(), !odd);
      for (size_t i = 0; i < batches_.size(); ++i) {
        (odd ? batches_[i].p : batches_[i].q).copy_(message.factors[i]);
      }
      write_result(message);
      return std::nullopt;
  }
}

PowerCodec::PowerCodec(at::Device device, int64_t rank, int64_t world, std::vector<MatrixBatch> batches,
                       at::Tensor segments, int64_t dense_numel, std::optional<at::ScalarType> wire)
    : LowRankCodec(device, rank, world, std::move(batches), std::move(segments), dense_numel, wire),
      first_(make_message(all_of(&MatrixBatch::p), true)),
      second_(make_message(all_of(&MatrixBatch::q), false)) {
  nonfinite_ = first_->flag;
}

std::optional<Message> PowerCodec::advance(int64_t, size_t stage) {
  switch (stage) {
    case 0:
      dropped_.zero_();
      for (size_t i = 0; i < batches_.size(); ++i) {
        project(i, batches_[i].q, first_->factors[i], false, /*corrects=*/true);
      }
      forget();
      put_dense(*first_);
      return first_->send();
    case 1:
      return first_->forward();
    case 2:
      first_->receive();
      for (size_t i = 0; i < batches_.size(); ++i) {
        batches_[i].p.copy_(first_->factors[i]);
        orthogonalize(i, batches_[i].p);
        project(i, batches_[i].p, second_->factors[i], true, /*corrects=*/false);
      }
      if (!rounds()) leave_pending(second_->factors, true);
      return second_->send();
    case 3:
      return second_->forward();
    default:
      second_->receive();
      if (rounds()) leave_pending(second_->shares(), true);
      for (size_t i = 0; i < batches_.size(); ++i) batches_[i].q.copy_(second_->factors[i]);
      write_result(*first_);
      return std::nullopt;
  }
}

}  // namespace dear::compress
