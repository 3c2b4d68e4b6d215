// The loops of kernels/cpu/levels.cpp, over one run of elements of one row. A run begins with a block that
// has a step of its own.
#pragma once

#include <cstdint>

#include "compress/kernels/levels.h"

namespace dear::compress::cpu {

// c = values + error, of n elements each, becomes fields of codes and the upper halves of steps; error what
// that lost. `factor`: level_factor(). Where c is beyond kLargestLevelled or not finite, the error stands in
// its place. Returns how many those are.
using LevelsRun = int64_t (*)(const float* values, float* error, int64_t n, float factor, uint32_t* fields,
                              uint16_t* steps);

// total += factor, a power of two, times what the codes say; the first of them begins with a total of 0.
using AddLevels = void (*)(const uint32_t* fields, const uint16_t* steps, float factor, int64_t n,
                           float* total);

struct LevelsLoops {
  LevelsRun quantize;
  AddLevels first;
  AddLevels next;
};

// For 2, 3 or 4 bits.
const LevelsLoops& levels_loops(int bits);

}  // namespace dear::compress::cpu
