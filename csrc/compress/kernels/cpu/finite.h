// Whether values are finite, found in one pass that writes nothing.
#pragma once

#include <cstdint>

#include "compress/layout.h"

namespace dear::compress::cpu {

// How many of n values are not finite.
int64_t count_nonfinite(const void* values, GradType type, int64_t n);

}  // namespace dear::compress::cpu
