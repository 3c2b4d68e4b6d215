#pragma once

#include <ATen/ATen.h>

namespace dear {

// How two values make one: (received * received_scale + own * own_scale) / divisor.
//
// Note [Averages without overflow]
// A sum of P values may overflow where their average does not. So values are scaled by a power of two of at
// most 1/P as they are added, and the last sum is divided by what is then missing, P * scale in (1/2, 1].
// Scaling by a power of two is exact (of all but subnormal numbers), so the average has the bits of a sum
// that is divided at its end, and no partial sum exceeds the largest value that went into it. Float16 is
// rounded as it is scaled, as DDP does, which divides first: its subnormal numbers begin at 6e-5.
struct AddRule {
  float own_scale = 1;
  float received_scale = 1;
  float divisor = 1;
};

// The rule of one hop of an average over `world` ranks; `first`: what was received is another rank's own
// values, not a sum; `last`: nothing will be added behind it. Integers are only divided, at the last hop.
AddRule average_rule(at::ScalarType type, int world, bool first, bool last);

// out[i] = received[i] and own[i] as the rule says, for `count` elements. The arithmetic of 16-bit types is
// done in float32 and the result rounded once; integers are added modulo 2^bits and divided towards zero.
// `out` may be `received` or `own`. Pointers need no alignment beyond the type's own.
void accumulate(at::ScalarType type, void* out, const void* received, const void* own, int64_t count,
                const AddRule& rule);

// Throws one sentence when `type` cannot be summed (complex, quantised, bool).
void check_summable(at::ScalarType type);

}  // namespace dear
