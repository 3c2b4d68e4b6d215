#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

namespace dear::compress {

// What a low-rank factor's element is on the wire. An owner's row holds a shard of [n] float32 values; rows
// are [owners, words] int32, may lie apart, and the last shards are short or empty.
class FactorWire {
 public:
  static std::unique_ptr<FactorWire> make(at::ScalarType type);
  virtual ~FactorWire() = default;

  // The smallest shard of at least so many elements that is whole words.
  virtual int64_t shard_numel(int64_t share) const = 0;
  virtual int64_t words(int64_t shard) const = 0;
  // Writes the rows of `values`, which are finite. `dropped` int32 [1].
  virtual void encode(const at::Tensor& values, int64_t shard, const at::Tensor& rows,
                      const at::Tensor& dropped) const = 0;
  // The mean of the `rows` that all ranks sent one owner, into its row `mean` [words]; `lost` [elements that
  // the owner has] becomes what rounding lost.
  virtual void average(const at::Tensor& rows, int64_t shard, const at::Tensor& mean, const at::Tensor& lost,
                       const at::Tensor& dropped) const = 0;
  // What the owners' rows say.
  virtual void decode(const at::Tensor& rows, int64_t shard, const at::Tensor& values) const = 0;
};

}  // namespace dear::compress
