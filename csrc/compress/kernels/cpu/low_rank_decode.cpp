#include <ATen/Parallel.h>

#include <algorithm>

#include "compress/kernels/cpu/low_rank.h"
#include "compress/kernels/cpu/scratch.h"
#include "compress/kernels/cpu/streamed.h"
#include "isa.h"

// A fused multiply-add rounds once where two operations round twice, and processors with and without it would
// decode different gradients.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "compress/kernels/cpu/tile.h"

namespace dear::compress::cpu {

namespace {
constexpr int64_t kGrain = 32768;
}  // namespace

// out = sum over k of one tile of p[k] * q[k], or out += that.
DEAR_CLONES void expand_tile(const float* p, const float* q, int64_t stride, int64_t n, bool add,
                             float* out) {
  const Tile tile(p, q, stride);
  if (add) {
    for (int64_t i = 0; i < n; ++i) out[i] += tile.product(i);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = tile.product(i);
  }
}

void low_rank_decode(const BatchShape& batch, const float* p, const float* q, const int64_t* starts,
                     GradType type, void* out) {
  const int64_t n = batch.columns;
  const int64_t rank = padded_rank(batch.rank);
  const int64_t grain = ceil_div(kGrain, std::max<int64_t>(n, 1));
  const DecodedResult result(out, type, batch.count * batch.numel());
  at::parallel_for(0, batch.count * batch.rows, grain, [&](int64_t first, int64_t last) {
    const StreamFence fence;
    float* across = thread_scratch<float>((rank + 1) * n + rank);
    float* row = across + rank * n;
    float* coefficients = row + n;
    std::fill(coefficients, coefficients + rank, 0.0f);
    int64_t entered = -1;
    for (int64_t i = first; i < last; ++i) {
      const int64_t matrix = i / batch.rows;
      if (matrix != entered) lay_across(q + matrix * n * batch.rank, n, batch.rank, across);
      entered = matrix;
      std::copy_n(p + i * batch.rank, batch.rank, coefficients);
      const int64_t begin = starts[matrix] + i % batch.rows * n;
      float* values = result.values(begin, row);
      for (int64_t k = 0; k < rank; k += kTile) {
        expand_tile(coefficients + k, across + k * n, n, n, k > 0, values);
      }
      result.store(begin, n, values);
    }
  });
}

}  // namespace dear::compress::cpu
