#pragma once

#include <cstddef>
#include <cstdint>

namespace dear {

// A checksum of `size` bytes, taken by the processor's CRC32C instruction where it has one, at about the
// speed of its cache; the same on every machine. Eight bytes at a time go in turn to one of three CRCs, which
// do not wait for each other; the result is the CRC of the three and of what is left. It notices every
// flipped bit and every burst of errors within eight bytes, and all but one in 2^32 of other damage. `seed`
// makes it another function.
//
// It guards against damage, not against malice: who sees frames can compute a seed.
uint32_t checksum(const void* data, size_t size, uint32_t seed);

// The same function without the instruction: the reference, and what other processors run.
uint32_t checksum_by_table(const void* data, size_t size, uint32_t seed);

}  // namespace dear
