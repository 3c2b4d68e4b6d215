#include "compress/codecs/half.h"

#include "compress/ops/dense.h"

namespace dear::compress {

HalfCodec::HalfCodec(at::Device device, int64_t rank, int64_t world, int64_t shard, int64_t owned,
                     at::ScalarType type, std::optional<at::Tensor> error,
                     std::optional<at::Tensor> owner_error)
    : OwnerCodec(device, rank, world, shard / 2),
      world_(world),
      shard_(shard),
      owned_(owned),
      type_(type),
      error_(std::move(error)),
      owner_error_(std::move(owner_error)) {}

void HalfCodec::encode(int64_t, const at::Tensor& rows) {
  const at::Tensor out = rows.view(type_);
  for (int64_t owner = 0; owner < world_; ++owner) {
    const int64_t begin = std::min(owner * shard_, gradient_.numel());
    const int64_t size = std::min(shard_, gradient_.numel() - begin);
    ops::OptionalTensor error;
    if (error_) error = error_->narrow(0, begin, size);
    ops::dense_round(gradient_.narrow(0, begin, size), error, out.select(0, owner).narrow(0, 0, size),
                     dropped_);
  }
}

void HalfCodec::merge(int64_t, const at::Tensor& rows, const at::Tensor& merged) {
  ops::dense_average(rows.view(type_).narrow(1, 0, owned_), owner_error_,
                     merged.view(type_).narrow(0, 0, owned_), dropped_);
}

void HalfCodec::decode(int64_t, const at::Tensor& rows) {
  ops::dense_decode(rows.view(type_), shard_, result_);
}

}  // namespace dear::compress
