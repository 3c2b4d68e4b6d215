#include "compress/kernels/cpu/levels.h"

#include "compress/kernels/cpu/element_scales.h"
#include "compress/kernels/cpu/levels_loops.h"
#include "compress/kernels/cpu/rounded_rows.h"

namespace dear::compress::cpu {

namespace {

// A format of rounded_rows.h. `squares`, or null: of the elements that places count.
struct FewBits {
  int bits;
  const LevelsLoops& loops;
  float* squares;

  FewBits(int of_bits, float* of_squares)
      : bits(of_bits), loops(levels_loops(of_bits)), squares(of_squares) {}

  int64_t quantize(const float* values, bool divided, float* error, const Rows& rows, const Place& place,
                   int32_t* payload) const {
    auto* fields = const_cast<uint32_t*>(fields_of(payload, rows, place));
    auto* steps = const_cast<uint16_t*>(steps_of(payload, rows, place));
    const float factor = level_factor(bits, squares != nullptr);
    if (squares == nullptr) return loops.quantize(values, error, place.length, factor, fields, steps);
    alignas(64) float scales[kBlock];
    alignas(64) float quotients[kBlock];
    element_scales(squares + place.element(rows), place.length, scales);
    divide_by_scales(error, scales, place.length, error);
    if (!divided) divide_by_scales(values, scales, place.length, quotients);
    const int64_t dropped =
        loops.quantize(divided ? values : quotients, error, place.length, factor, fields, steps);
    multiply_by_scales(scales, place.length, error);
    return dropped;
  }

  void add(const int32_t* payload, const Rows& rows, const Place& place, bool first, float factor,
           float* total) const {
    (first ? loops.first : loops.next)(fields_of(payload, rows, place), steps_of(payload, rows, place),
                                       factor, place.length, total);
  }

  void finish(int64_t begin, int64_t n, float* values) const {
    if (squares == nullptr) return;
    alignas(64) float scales[kBlock];
    element_scales(squares + begin, n, scales);
    multiply_by_scales(scales, n, values);
    learn_squares(values, n, squares + begin);
  }

 private:
  const uint32_t* fields_of(const int32_t* payload, const Rows& rows, const Place& place) const {
    const int32_t* row = payload + place.row * rows.stride;
    return reinterpret_cast<const uint32_t*>(row) + place.offset * bits / 32;
  }
  const uint16_t* steps_of(const int32_t* payload, const Rows& rows, const Place& place) const {
    const int32_t* behind = payload + place.row * rows.stride + rows.shard * bits / 32;
    return reinterpret_cast<const uint16_t*>(behind) + place.offset / kScaleBlock;
  }
};

}  // namespace

int64_t levels_encode(const void* grad, GradType type, float* error, float* squares, int64_t n,
                      const Rows& rows, int bits, int32_t* payload) {
  return encode_rows(FewBits(bits, squares), grad, type, error, n, rows, payload);
}

int64_t levels_average(const int32_t* payloads, const Rows& ranks, float* error, float* squares, int64_t n,
                       int bits, int32_t* out) {
  return average_rows(FewBits(bits, squares), payloads, ranks, error, n, out);
}

void levels_decode(const int32_t* payload, const Rows& rows, int64_t n, int bits, GradType type,
                   float* squares, void* out) {
  decode_rows(FewBits(bits, squares), payload, rows, n, type, out);
}

}  // namespace dear::compress::cpu
