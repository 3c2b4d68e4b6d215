#include "compress/codecs/sign.h"

#include "compress/ops/sign.h"

namespace dear::compress {

SignCodec::SignCodec(at::Device device, int64_t rank, int64_t world, int64_t words, int64_t owned,
                     std::optional<at::Tensor> error, std::optional<at::Tensor> owner_error, bool scaled)
    : OwnerCodec(device, rank, world, words),
      world_(world),
      owned_(owned),
      error_(std::move(error)),
      owner_error_(std::move(owner_error)),
      scaled_(scaled),
      packed_(int_buffer({world, words})) {}

void SignCodec::encode(int64_t, const at::Tensor& rows) {
  ops::sign_encode(gradient_, error_, packed_.view(-1), dropped_, scaled_);
  rows.copy_(packed_);
}

void SignCodec::merge(int64_t step, const at::Tensor& rows, const at::Tensor& merged) {
  if (scaled_) {
    ops::sign_average(rows, owner_error_, merged, owned_, dropped_);
  } else {
    ops::sign_vote(rows, merged, step % world_);
  }
}

void SignCodec::decode(int64_t, const at::Tensor& rows) {
  packed_.copy_(rows);
  ops::sign_decode(packed_.view(-1), result_);
}

}  // namespace dear::compress
