// What the formats with a scale for each block of elements share, for host and device.
#pragma once

#include <cstdint>
#include <cstring>

#include "compress/layout.h"

namespace dear::compress {

// Rows of a payload, one for each owner: `stride` words apart, each of a shard of so many elements.
struct Rows {
  int64_t count;
  int64_t stride;
  int64_t shard;
};

DEAR_HOST_DEVICE inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

DEAR_HOST_DEVICE inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace dear::compress
