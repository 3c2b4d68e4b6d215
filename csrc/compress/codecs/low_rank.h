#pragma once

#include <vector>

#include "compress/codec.h"

namespace dear::compress {

// All matrices of one shape in a group: B of [n, m], and their factors of rank r. The factors are the same on
// all ranks, and are kept from step to step.
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
  // has, and where it begins in the dense part of a message.
  LowRankCodec(at::Device device, int64_t rank, int64_t world, std::vector<MatrixBatch> batches,
               at::Tensor segments, int64_t dense_numel);

  // A message that is averaged: the factors of all batches, the dense members, and how many elements were
  // dropped.
  struct Average {
    at::Tensor flat;
    at::Tensor shard;                 // this rank's part of it
    std::vector<at::Tensor> factors;  // [B, n or m, r]: views of it
    at::Tensor dense;
    at::Tensor flag;
  };
  Average make_average(bool of_p, bool with_dense) const;
  static Message reduce_scatter(const Average& message) {
    return {Phase::kReduceScatter, message.flat, message.shard};
  }
  static Message all_gather(const Average& message) { return {Phase::kAllGather, message.flat, {}}; }

  void orthogonalize(size_t batch, const at::Tensor& factors) const;
  // factor <- C Q (`transposed`: C^T P), where `fixed` is Q (or P), and C = gradient + E if `corrects`, else
  // what the last such call made of E.
  void project(size_t batch, const at::Tensor& fixed, const at::Tensor& factor, bool transposed,
               bool corrects);
  // The factors of this step, one of them `own` of this rank and the other one fixed, are what E does not say
  // any more: they are taken out of it in the next step. To be called when all batches are projected.
  void leave_pending(const std::vector<at::Tensor>& own, bool transposed);
  void put_dense(const Average& message);
  // The result: P Q^T of every batch, and the dense members of `message`.
  void write_result(const Average& message);

  std::vector<MatrixBatch> batches_;

 private:
  const int64_t rank_;
  const int64_t world_;
  at::Tensor segments_;
  const int64_t dense_numel_;
  std::vector<at::Tensor> corrected_;  // C, or a buffer in its place, by batch
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
           at::Tensor segments, int64_t dense_numel, std::shared_ptr<const StartStep> start);
  size_t stages(int64_t) const override { return 2; }
  std::optional<Message> advance(int64_t step, size_t stage) override;

 private:
  const std::shared_ptr<const StartStep> start_;
  Average of_p_;
  Average of_q_;
};

// compress.PowerSGD, whose docstring has the steps.
class PowerCodec : public LowRankCodec {
 public:
  PowerCodec(at::Device device, int64_t rank, int64_t world, std::vector<MatrixBatch> batches,
             at::Tensor segments, int64_t dense_numel);
  size_t stages(int64_t) const override { return 4; }
  std::optional<Message> advance(int64_t step, size_t stage) override;

 private:
  Average first_;   // P and the dense members
  Average second_;  // Q
};

}  // namespace dear::compress
