#pragma once

#include "compress/codecs/owner.h"

namespace dear::compress {

// compress.Dense: every element, in 16 bits on the wire, summed in float32.
class HalfCodec : public OwnerCodec {
 public:
  // `type`: kHalf or kBFloat16. `shard`: elements of one owner, even; `owned`: how many of this rank's there
  // are.
  HalfCodec(at::Device device, int64_t rank, int64_t world, int64_t shard, int64_t owned, at::ScalarType type,
            std::optional<at::Tensor> error, std::optional<at::Tensor> owner_error);

 protected:
  void encode(int64_t step, const at::Tensor& rows) override;
  void merge(int64_t step, const at::Tensor& rows, const at::Tensor& merged) override;
  void decode(int64_t step, const at::Tensor& rows) override;

 private:
  const int64_t world_;
  const int64_t shard_;
  const int64_t owned_;
  const at::ScalarType type_;
  std::optional<at::Tensor> error_;
  std::optional<at::Tensor> owner_error_;
};

}  // namespace dear::compress
