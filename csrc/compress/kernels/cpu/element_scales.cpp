#include "compress/kernels/cpu/element_scales.h"

#include <algorithm>

#include "compress/kernels/cpu/scale_blocks.h"
#include "compress/kernels/element_scales.h"
#include "isa.h"

namespace dear::compress::cpu {

namespace {

// `n` is the block's length, which a compiler that knows it makes whole vectors of.
DEAR_INLINED void scales_of_block(const float* __restrict squares, int64_t n, float* __restrict scales) {
  int32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, root_exponent(squares[i]));
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += root_share(root_exponent(squares[i]), largest);
  const int32_t least = least_exponent(largest, sum, static_cast<int32_t>(n));
  for (int64_t i = 0; i < n; ++i) scales[i] = scale_of_element(root_exponent(squares[i]), least);
}

}  // namespace

DEAR_CLONES void element_scales(const float* squares, int64_t n, float* scales) {
  over_scale_blocks(n, [&](int64_t begin, int64_t length) __attribute__((always_inline)) {
    scales_of_block(squares + begin, length, scales + begin);
  });
}

DEAR_CLONES void divide_by_scales(const float* values, const float* scales, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = values[i] * inverse_of_power(scales[i]);
}

DEAR_CLONES void multiply_by_scales(const float* __restrict scales, int64_t n, float* __restrict values) {
  for (int64_t i = 0; i < n; ++i) values[i] *= scales[i];
}

DEAR_CLONES void learn_squares(const float* __restrict results, int64_t n, float* __restrict squares) {
  for (int64_t i = 0; i < n; ++i) squares[i] = with_result(squares[i], results[i]);
}

}  // namespace dear::compress::cpu
