// Include it behind a file's own pragma about float arithmetic: the sum below follows the rules of its user.
#pragma once

#include <cstdint>

namespace dear::compress::cpu {
namespace {

constexpr int64_t kTile = 4;

// One tile of the rank: four coefficients, and the rows [n] that they weigh, `stride` apart.
struct Tile {
  __attribute__((always_inline)) Tile(const float* down, const float* across, int64_t stride)
      : d0(down[0]),
        d1(down[1]),
        d2(down[2]),
        d3(down[3]),
        q0(across),
        q1(across + stride),
        q2(across + 2 * stride),
        q3(across + 3 * stride) {}

  // The sum over the tile at place i.
  __attribute__((always_inline)) float product(int64_t i) const {
    return (d0 * q0[i] + d1 * q1[i]) + (d2 * q2[i] + d3 * q3[i]);
  }

  const float d0, d1, d2, d3;
  const float *q0, *q1, *q2, *q3;
};

}  // namespace
}  // namespace dear::compress::cpu
