#include "compress/codecs/quantized.h"

#include "compress/layout.h"
#include "compress/ops/quantize.h"

namespace dear::compress {

namespace {

// A hash of 64 bits (splitmix64).
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

QuantizedCodec::QuantizedCodec(at::Device device, int64_t rank, int64_t world, int64_t shard, int64_t owned,
                               bool floating, int64_t seed, std::optional<at::Tensor> error,
                               std::optional<at::Tensor> owner_error)
    : OwnerCodec(device, rank, world, whole_row(quantized_words(shard))),
      rank_(rank),
      words_(quantized_words(shard)),
      shard_(shard),
      owned_(owned),
      floating_(floating),
      seed_(seed),
      error_(std::move(error)),
      owner_error_(std::move(owner_error)) {}

void QuantizedCodec::encode(int64_t step, const at::Tensor& rows) {
  ops::quantize_encode(gradient_, error_, shard_, rows.narrow(1, 0, words_), dropped_, floating_,
                       key(step, 0));
}

void QuantizedCodec::merge(int64_t step, const at::Tensor& rows, const at::Tensor& merged) {
  ops::quantize_average(rows.narrow(1, 0, words_), owner_error_, shard_, merged.narrow(0, 0, words_), owned_,
                        dropped_, floating_, key(step, 1));
}

void QuantizedCodec::decode(int64_t, const at::Tensor& rows) {
  ops::quantize_decode(rows.narrow(1, 0, words_), shard_, result_, floating_);
}

std::optional<int64_t> QuantizedCodec::key(int64_t step, int64_t rounding) const {
  if (error_) return std::nullopt;
  const uint64_t place = mix(static_cast<uint64_t>(seed_)) ^ static_cast<uint64_t>(2 * rank_ + rounding);
  return static_cast<int64_t>(mix(mix(place) ^ static_cast<uint64_t>(step)) >> 32);
}

}  // namespace dear::compress
