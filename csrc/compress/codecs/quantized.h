#pragma once

#include "compress/codecs/owner.h"

namespace dear::compress {

// compress.Dense in eight bits: Note [Eight bits on the wire]. With error feedback both roundings are to the
// nearest; without it they are stochastic, so that what they lose is right in the mean.
class QuantizedCodec : public OwnerCodec {
 public:
  // `shard`: elements of one owner; `owned`: how many of this rank's there are. `floating`: e4m3fn, else
  // int8. `seed`: of what is drawn, for this group; the same on every rank.
  QuantizedCodec(at::Device device, int64_t rank, int64_t world, int64_t shard, int64_t owned, bool floating,
                 int64_t seed, std::optional<at::Tensor> error, std::optional<at::Tensor> owner_error);

 protected:
  void encode(int64_t step, const at::Tensor& rows) override;
  void merge(int64_t step, const at::Tensor& rows, const at::Tensor& merged) override;
  void decode(int64_t step, const at::Tensor& rows) override;

 private:
  // Of one rounding of a step; none where it is to the nearest.
  std::optional<int64_t> key(int64_t step, int64_t rounding) const;

  const int64_t rank_;
  const int64_t words_;  // of one owner's shard
  const int64_t shard_;
  const int64_t owned_;
  const bool floating_;
  const int64_t seed_;
  std::optional<at::Tensor> error_;
  std::optional<at::Tensor> owner_error_;
};

}  // namespace dear::compress
