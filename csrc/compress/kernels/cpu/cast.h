// Conversion between the gradient types and float32, one block at a time, so that every other kernel is
// written once, in float32. The converted block stays in the first-level cache.
#pragma once

#include <cstdint>

#include "compress/layout.h"

namespace dear::compress::cpu {

// The block as float32: `source` itself when it is float32 already, else `scratch` (n floats) filled from it.
const float* load_block(const void* source, GradType type, int64_t n, float* scratch);

// Rounds n floats to `type`, to nearest even; values out of range become infinite, NaN stays NaN.
void store_block(const float* source, GradType type, int64_t n, void* target);

// The same for decoded values, which may lie a little outside the range of the gradients that they stand for:
// those are held at its ends. `source` may be changed.
void store_within_range(float* source, GradType type, int64_t n, void* target);

// out = values, held within [-limit, limit]; NaN stays NaN. `out` may be `values`.
void clamp_values(const float* values, int64_t n, float limit, float* out);

// values /= divisor.
void divide_values(float* values, int64_t n, float divisor);

// The address of element `offset` of a tensor of `type`.
inline const void* element(const void* base, GradType type, int64_t offset) {
  return static_cast<const char*>(base) + offset * grad_bytes(type);
}
inline void* element(void* base, GradType type, int64_t offset) {
  return static_cast<char*>(base) + offset * grad_bytes(type);
}

}  // namespace dear::compress::cpu
