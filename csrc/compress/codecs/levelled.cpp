#include "compress/codecs/levelled.h"

#include "compress/layout.h"
#include "compress/ops/levels.h"

namespace dear::compress {

LevelledCodec::LevelledCodec(at::Device device, int64_t rank, int64_t world, int64_t shard, int64_t owned,
                             int64_t bits, std::optional<at::Tensor> error,
                             std::optional<at::Tensor> owner_error)
    : OwnerCodec(device, rank, world, whole_row(levelled_words(shard, bits))),
      words_(levelled_words(shard, bits)),
      shard_(shard),
      owned_(owned),
      bits_(bits),
      error_(error.value_or(at::Tensor())),
      owner_error_(owner_error.value_or(at::Tensor())) {}

void LevelledCodec::encode(int64_t, const at::Tensor& rows) {
  ops::levels_encode(gradient_, error_, shard_, rows.narrow(1, 0, words_), dropped_, bits_);
}

void LevelledCodec::merge(int64_t, const at::Tensor& rows, const at::Tensor& merged) {
  ops::levels_average(rows.narrow(1, 0, words_), owner_error_, shard_, merged.narrow(0, 0, words_), owned_,
                      dropped_, bits_);
}

void LevelledCodec::decode(int64_t, const at::Tensor& rows) {
  ops::levels_decode(rows.narrow(1, 0, words_), shard_, result_, bits_);
}

}  // namespace dear::compress
