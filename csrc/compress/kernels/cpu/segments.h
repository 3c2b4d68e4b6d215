// Runs of a flat gradient, gathered into one float32 message and scattered back.
#pragma once

#include <cstdint>

#include "compress/layout.h"

namespace dear::compress::cpu {

// message[position ...] = source[start ...] for each of `count` segments. Returns how many of the elements
// are not finite; they are copied as they are.
int64_t gather_segments(const void* source, GradType type, const Segment* segments, int64_t count,
                        float* message);

// out[start ...] = message[position ...] for each segment, rounded to `type`.
void scatter_segments(const float* message, const Segment* segments, int64_t count, GradType type, void* out);

}  // namespace dear::compress::cpu
