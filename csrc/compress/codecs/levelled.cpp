#include "compress/codecs/levelled.h"

#include <algorithm>

#include "compress/kernels/element_scales.h"
#include "compress/layout.h"
#include "compress/ops/levels.h"

namespace dear::compress {

LevelledCodec::LevelledCodec(at::Device device, int64_t rank, int64_t world, int64_t shard, int64_t owned,
                             int64_t bits, std::optional<at::Tensor> error,
                             std::optional<at::Tensor> owner_error, std::optional<at::Tensor> squares)
    : OwnerCodec(device, rank, world, whole_row(levelled_words(shard, bits))),
      words_(levelled_words(shard, bits)),
      shard_(shard),
      owned_(owned),
      bits_(bits),
      error_(std::move(error)),
      owner_error_(std::move(owner_error)),
      squares_(std::move(squares)) {
  if (squares_) owned_squares_ = squares_->narrow(0, std::min(rank * shard, squares_->numel()), owned);
}

void LevelledCodec::encode(int64_t, const at::Tensor& rows) {
  ops::levels_encode(gradient_, error_, shard_, rows.narrow(1, 0, words_), dropped_, bits_, squares_);
}

void LevelledCodec::merge(int64_t, const at::Tensor& rows, const at::Tensor& merged) {
  ops::levels_average(rows.narrow(1, 0, words_), owner_error_, shard_, merged.narrow(0, 0, words_), owned_,
                      dropped_, bits_, owned_squares_);
}

void LevelledCodec::decode(int64_t, const at::Tensor& rows) {
  ops::levels_decode(rows.narrow(1, 0, words_), shard_, result_, bits_, squares_);
}

// The squares of the last dense result are the first means. Of 8 bits of it, which every rank rounds alike
// and whose squares are exact: the same bits on every processor. Nothing is learnt where it is not finite,
// since ranks may have marked that differently.
void LevelledCodec::learn(const at::Tensor& result) {
  if (!squares_) return;
  const at::Tensor held = result.to(at::kBFloat16).to(at::kFloat).clamp_(-kLargestResult, kLargestResult);
  const at::Tensor square = held.square_();
  square.masked_fill_(square < kSmallestSquare, 0);
  squares_->copy_(at::where(result.isfinite().all(), square, *squares_));
}

}  // namespace dear::compress
