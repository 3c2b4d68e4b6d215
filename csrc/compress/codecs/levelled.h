#pragma once

#include "compress/codecs/owner.h"

namespace dear::compress {

// compress.Dense in 2, 3 or 4 bits: Note [Few bits on the wire], and where there are running means of the
// squares of results, Note [A scale for each element].
class LevelledCodec : public OwnerCodec {
 public:
  // `shard`: elements of one owner; `owned`: how many of this rank's there are. `squares`: of all elements of
  // the group.
  LevelledCodec(at::Device device, int64_t rank, int64_t world, int64_t shard, int64_t owned, int64_t bits,
                std::optional<at::Tensor> error, std::optional<at::Tensor> owner_error,
                std::optional<at::Tensor> squares);
  void learn(const at::Tensor& result) override;

 protected:
  void encode(int64_t step, const at::Tensor& rows) override;
  void merge(int64_t step, const at::Tensor& rows, const at::Tensor& merged) override;
  void decode(int64_t step, const at::Tensor& rows) override;

 private:
  const int64_t words_;  // of one owner's shard
  const int64_t shard_;
  const int64_t owned_;
  const int64_t bits_;
  std::optional<at::Tensor> error_;
  std::optional<at::Tensor> owner_error_;
  std::optional<at::Tensor> squares_;
  std::optional<at::Tensor> owned_squares_;
};

}  // namespace dear::compress
