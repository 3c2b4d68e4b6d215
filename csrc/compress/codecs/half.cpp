#include "compress/codecs/half.h"

#include "compress/ops.h"

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
      owner_error_(std::move(owner_error)),
      total_(at::empty({owned}, at::TensorOptions().device(device).dtype(at::kFloat))) {}

void HalfCodec::encode(int64_t, const at::Tensor& rows) {
  if (error_) ops::error_correct(gradient_, *error_, dropped_);
  const at::Tensor& values = error_ ? *error_ : gradient_;
  const at::Tensor out = rows.view(type_);
  for (int64_t owner = 0; owner < world_; ++owner) {
    const int64_t begin = std::min(owner * shard_, values.numel());
    const int64_t size = std::min(shard_, values.numel() - begin);
    const at::Tensor row = out.select(0, owner).narrow(0, 0, size);
    if (error_) {
      round(values.narrow(0, begin, size), error_->narrow(0, begin, size), row);
    } else {
      round(values.narrow(0, begin, size), std::nullopt, row);
    }
  }
  if (!error_) dropped_.copy_(out.isfinite().logical_not_().sum());
}

void HalfCodec::merge(int64_t, const at::Tensor& rows, const at::Tensor& merged) {
  at::sum_out(total_, rows.view(type_).narrow(1, 0, owned_), {0}, /*keepdim=*/false, at::kFloat);
  total_.div_(world_);
  const at::Tensor& values = owner_error_ ? owner_error_->add_(total_) : total_;
  const at::Tensor out = merged.view(type_).narrow(0, 0, owned_);
  round(values, owner_error_, out);
  dropped_.copy_(out.isfinite().logical_not_().sum());
}

void HalfCodec::decode(int64_t, const at::Tensor& rows) {
  const at::Tensor values = rows.view(type_);
  for (int64_t owner = 0; owner < world_; ++owner) {
    const int64_t begin = std::min(owner * shard_, result_.numel());
    const int64_t size = std::min(shard_, result_.numel() - begin);
    result_.narrow(0, begin, size).copy_(values.select(0, owner).narrow(0, 0, size));
  }
}

void HalfCodec::round(const at::Tensor& values, const std::optional<at::Tensor>& error,
                      const at::Tensor& out) const {
  if (!error) {
    out.copy_(values);
    return;
  }
  const double largest =
      type_ == at::kHalf ? 65504.0 : static_cast<double>(std::numeric_limits<c10::BFloat16>::max());
  out.copy_(values.clamp(-largest, largest));
  error->sub_(out);
}

}  // namespace dear::compress
