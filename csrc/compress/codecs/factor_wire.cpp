#include "compress/codecs/factor_wire.h"

#include "compress/layout.h"
#include "compress/ops/dense.h"
#include "compress/ops/quantize.h"

namespace dear::compress {

namespace {

// A float of 16 bits for itself.
class Half : public FactorWire {
 public:
  explicit Half(at::ScalarType type) : type_(type) {}

  int64_t shard_numel(int64_t share) const override { return ceil_div(share, 2) * 2; }
  int64_t words(int64_t shard) const override { return shard / 2; }

  void encode(const at::Tensor& values, int64_t shard, const at::Tensor& rows,
              const at::Tensor& dropped) const override {
    const at::Tensor rounded = rows.view(type_);
    for (int64_t owner = 0; owner * shard < values.numel(); ++owner) {
      const int64_t begin = owner * shard, size = std::min(shard, values.numel() - begin);
      ops::dense_round(values.narrow(0, begin, size), std::nullopt,
                       rounded.select(0, owner).narrow(0, 0, size), dropped);
    }
  }

  void average(const at::Tensor& rows, int64_t shard, const at::Tensor& mean, const at::Tensor& lost,
               const at::Tensor& dropped) const override {
    const int64_t numel = lost.numel();
    if (numel == 0) return;
    lost.zero_();
    ops::dense_average(rows.view(type_).narrow(1, 0, numel), lost, mean.view(type_).narrow(0, 0, numel),
                       dropped);
  }

  void decode(const at::Tensor& rows, int64_t shard, const at::Tensor& values) const override {
    ops::dense_decode(rows.view(type_), shard, values);
  }

 private:
  const at::ScalarType type_;
};

// A byte, and a scale for each block; see Note [Eight bits on the wire].
class EightBits : public FactorWire {
 public:
  int64_t shard_numel(int64_t share) const override { return ceil_div(share, kScaleUnit) * kScaleUnit; }
  int64_t words(int64_t shard) const override { return quantized_words(shard); }

  void encode(const at::Tensor& values, int64_t shard, const at::Tensor& rows,
              const at::Tensor& dropped) const override {
    ops::quantize_encode(values, std::nullopt, shard, rows, dropped, /*floating=*/false, std::nullopt);
  }

  void average(const at::Tensor& rows, int64_t shard, const at::Tensor& mean, const at::Tensor& lost,
               const at::Tensor& dropped) const override {
    lost.zero_();
    ops::quantize_average(rows, lost, shard, mean, lost.numel(), dropped, /*floating=*/false, std::nullopt);
  }

  void decode(const at::Tensor& rows, int64_t shard, const at::Tensor& values) const override {
    ops::quantize_decode(rows, shard, values, /*floating=*/false);
  }
};

}  // namespace

std::unique_ptr<FactorWire> FactorWire::make(at::ScalarType type) {
  if (type == at::kChar) return std::make_unique<EightBits>();
  return std::make_unique<Half>(type);
}

}  // namespace dear::compress
