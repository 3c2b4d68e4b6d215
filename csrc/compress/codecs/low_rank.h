#pragma once

#include <vector>

#include "compress/codec.h"
#include "compress/codecs/factor_message.h"

namespace dear::compress {

// All matrices of one shape in a group: B of [n, m], and their factors of rank r, which are kept from step to
// step. The factors are the same on all ranks, but those of LocalCodec.
struct MatrixBatch {
  at::Tensor starts;                // int64 [B]: where each one begins in the gradient
  std::optional<at::Tensor> error;  // [B, n, m] float32, where there is feedback
  at::Tensor p;                     // [B, n, r]
  at::Tensor q;                     // [B, m, r]
};

// What ACP-SGD and Power-SGD share: one pass over a batch to correct and project it, and the members that
// travel dense in the same message.
class LowRankCodec : public Codec {
 public:
  // Takes over the columns of the factors that both ranks have.
  void follow(const Codec& before) override;
  // Subspace iterations on the result, so that the first compressed step knows what matters.
  void learn(const at::Tensor& result) override;
  // See Note [Four passes].
  void settle() override;
  void forget() override { pending_ = Pending::kNone; }

 protected:
  // `segments`: int64 [count, 3], of each dense member where it begins in the gradient, how many elements it
  // has, and where it begins in the dense part of a message. `wire`: the type in which factors travel (see
  // FactorWire); none for float32.
  LowRankCodec(at::Device device, int64_t rank, int64_t world, std::vector<MatrixBatch> batches,
               at::Tensor segments, int64_t dense_numel, std::optional<at::ScalarType> wire);

  // `like`: of the factors' shapes.
  std::unique_ptr<FactorMessage> make_message(const std::vector<at::Tensor>& like, bool with_dense) const;
  // P of every batch, or Q.
  std::vector<at::Tensor> all_of(at::Tensor MatrixBatch::* factor) const;

  void orthogonalize(size_t batch, const at::Tensor& factors) const;
  // factor <- C Q (`transposed`: C^T P), where `fixed` is Q (or P), and C = gradient + E if `corrects`, else
  // what the last such call made of E.
  void project(size_t batch, const at::Tensor& fixed, const at::Tensor& factor, bool transposed,
               bool corrects);
  // Whether factors travel in fewer bits than 32.
  bool rounds() const { return wire_.has_value(); }
  // The factors of this step, one of them `own` of this rank and the other one fixed, are what E does not say
  // any more: they are taken out of it in the next step. To be called when all batches are projected; where
  // factors are rounded, with this rank's shares of the mean, once these are known (Note [Rounded factors]).
  void leave_pending(const std::vector<at::Tensor>& own, bool transposed);
  // This rank's dense members, one after another: float32 [elements].
  void gather_dense(const at::Tensor& dense);
  // The dense members' part of the result.
  void scatter_dense(const at::Tensor& dense);
  void put_dense(const FactorMessage& message);
  // The result: P Q^T of every batch, and the dense members of `message`.
  void write_result(const FactorMessage& message);

  std::vector<MatrixBatch> batches_;

 private:
  // Zeros in place of the error feedback that there is not.
  void clear(size_t batch);

  const int64_t rank_;
  const int64_t world_;
  at::Tensor segments_;
  const int64_t dense_numel_;
  const std::optional<at::ScalarType> wire_;
  std::vector<at::Tensor> corrected_;  // C, by batch: the error feedback, or where there is none a buffer
  enum class Pending { kNone, kOwnP, kOwnQ };
  Pending pending_ = Pending::kNone;  // which of the pending factors is this rank's own, in the next
  std::vector<at::Tensor> own_p_;
  std::vector<at::Tensor> own_q_;
  std::vector<at::Tensor> workspace_;
};

// compress.ACPSGD, whose docstring has the steps.
class AcpCodec : public LowRankCodec {
 public:
  AcpCodec(at::Device device, int64_t rank, int64_t world, std::vector<MatrixBatch> batches,
           at::Tensor segments, int64_t dense_numel, std::optional<at::ScalarType> wire,
           std::shared_ptr<const StartStep> start);
  size_t stages(int64_t) const override { return 2; }
  bool all_to_all(int64_t, size_t stage) const override { return stage == 0 && of_p_->all_to_all(); }
  std::optional<Message> advance(int64_t step, size_t stage) override;

 private:
  const std::shared_ptr<const StartStep> start_;
  const std::unique_ptr<FactorMessage> of_p_;
  const std::unique_ptr<FactorMessage> of_q_;
};

// compress.PowerSGD, whose docstring has the steps.
class PowerCodec : public LowRankCodec {
 public:
  PowerCodec(at::Device device, int64_t rank, int64_t world, std::vector<MatrixBatch> batches,
             at::Tensor segments, int64_t dense_numel, std::optional<at::ScalarType> wire);
  size_t stages(int64_t) const override { return 4; }
  bool all_to_all(int64_t, size_t stage) const override {
    return (stage == 0 && first_->all_to_all()) || (stage == 2 && second_->all_to_all());
  }
  std::optional<Message> advance(int64_t step, size_t stage) override;

 private:
  const std::unique_ptr<FactorMessage> first_;   // P and the dense members
  const std::unique_ptr<FactorMessage> second_;  // Q
};

}  // namespace dear::compress
