#pragma once

#include "compress/codecs/owner.h"

namespace dear::compress {

// compress.SignSGD, whose docstring has the equations.
class SignCodec : public OwnerCodec {
 public:
  // `words`: of one owner's shard. `error` [n] and `owner_error` [this rank's shard of it] where there is
  // feedback. `scaled`: vote by the mean, else by majority.
  SignCodec(at::Device device, int64_t rank, int64_t world, int64_t words, int64_t owned,
            std::optional<at::Tensor> error, std::optional<at::Tensor> owner_error, bool scaled);

 protected:
  void encode(int64_t step, const at::Tensor& rows) override;
  void merge(int64_t step, const at::Tensor& rows, const at::Tensor& merged) override;
  void decode(int64_t step, const at::Tensor& rows) override;

 private:
  const int64_t world_;
  const int64_t owned_;  // elements
  std::optional<at::Tensor> error_;
  std::optional<at::Tensor> owner_error_;
  const bool scaled_;
  at::Tensor packed_;  // [ranks, words]: the kernels want all shards in a run
};

}  // namespace dear::compress
