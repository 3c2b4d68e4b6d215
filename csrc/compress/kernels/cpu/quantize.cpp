#include "compress/kernels/cpu/quantize.h"

#include "compress/kernels/cpu/quantize_loops.h"
#include "compress/kernels/cpu/rounded_rows.h"

namespace dear::compress::cpu {

namespace {

// A format of rounded_rows.h.
struct EightBits {
  CodeType code;
  Rounding rounding;

  int64_t quantize(const float* values, bool, float* error, const Rows& rows, const Place& place,
                   int32_t* payload) const {
    return quantize_loop(code, rounding.stochastic)(values, error, place.length, rounding.key,
                                                    static_cast<uint32_t>(place.element(rows)),
                                                    const_cast<uint8_t*>(codes_of(payload, rows, place)),
                                                    const_cast<uint8_t*>(scales_of(payload, rows, place)));
  }
  void add(const int32_t* payload, const Rows& rows, const Place& place, bool first, float factor,
           float* total) const {
    add_loop(code, first)(codes_of(payload, rows, place), scales_of(payload, rows, place), factor,
                          place.length, total);
  }
  void finish(int64_t, int64_t, float*) const {}

 private:
  static const uint8_t* codes_of(const int32_t* payload, const Rows& rows, const Place& place) {
    return reinterpret_cast<const uint8_t*>(payload + place.row * rows.stride) + place.offset;
  }
  static const uint8_t* scales_of(const int32_t* payload, const Rows& rows, const Place& place) {
    return reinterpret_cast<const uint8_t*>(payload + place.row * rows.stride) + rows.shard +
           place.offset / kScaleBlock;
  }
};

}  // namespace

int64_t quantize_encode(const void* grad, GradType type, float* error, int64_t n, const Rows& rows,
                        CodeType code, Rounding rounding, int32_t* payload) {
  return encode_rows(EightBits{code, rounding}, grad, type, error, n, rows, payload);
}

int64_t quantize_average(const int32_t* payloads, const Rows& ranks, float* error, int64_t n, CodeType code,
                         Rounding rounding, int32_t* out) {
  return average_rows(EightBits{code, rounding}, payloads, ranks, error, n, out);
}

void quantize_decode(const int32_t* payload, const Rows& rows, int64_t n, CodeType code, GradType type,
                     void* out) {
  decode_rows(EightBits{code, {}}, payload, rows, n, type, out);
}

}  // namespace dear::compress::cpu
