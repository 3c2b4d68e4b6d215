// A run of elements, block by block, for the loops of formats that have a scale for each block.
#pragma once

#include <cstdint>

#include "compress/layout.h"

// Templates are inlined into functions that are compiled once per instruction set, which templates cannot be.
#define DEAR_INLINED __attribute__((always_inline)) inline

namespace dear::compress::cpu {

// Calls visit(begin, length) for the blocks of n elements. Of whole ones a compiler knows the length, and
// makes whole vectors of it: `visit` must be inlined, too.
template <typename Visit>
DEAR_INLINED void over_scale_blocks(int64_t n, const Visit& visit) {
  int64_t begin = 0;
  for (; begin + kScaleBlock <= n; begin += kScaleBlock) visit(begin, kScaleBlock);
  if (begin < n) visit(begin, n - begin);
}

}  // namespace dear::compress::cpu
