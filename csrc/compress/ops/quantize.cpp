#include "compress/ops/quantize.h"

#include <c10/util/Exception.h>

#include "compress/kernels/cpu/quantize.h"
#include "compress/ops/operator.h"
#ifdef DEAR_WITH_CUDA
#include "compress/kernels/cuda/quantize.h"
#include "compress/ops/launch.h"
#endif

namespace dear::compress::ops {

namespace {

using OptionalKey = std::optional<int64_t>;

CodeType code_type(bool floating) { return floating ? CodeType::kFloat8 : CodeType::kInt8; }
Rounding rounding_by(const OptionalKey& key) {
  return {key.has_value(), static_cast<uint32_t>(key.value_or(0))};
}
Rows rows_of(const Tensor& payload, int64_t shard) { return {payload.size(0), payload.stride(0), shard}; }

// Rows of int32 words, each packed, of shards of so many elements.
void check_rows(const Tensor& payload, int64_t shard, const Tensor& data) {
  TORCH_CHECK_VALUE(shard >= 0 && shard % kScaleUnit == 0, "the shard has ", shard,
                    " elements: give a multiple of ", kScaleUnit, ".");
  TORCH_CHECK_TYPE(payload.scalar_type() == at::kInt, "the payload must be Int, but it is ",
                   payload.scalar_type(), ": convert it first.");
  check_same_device(payload, data, "the payload", "the data");
  TORCH_CHECK_VALUE(payload.dim() == 2 && payload.size(0) >= 1 && payload.size(1) == quantized_words(shard) &&
                        (payload.size(1) <= 1 || payload.stride(1) == 1),
                    "the payload must be [rows, ", quantized_words(shard), "] with packed rows, but it is ",
                    payload.sizes(), ": give each shard that many words.");
}

void check_shards(const Tensor& payload, int64_t shard, const Tensor& grad) {
  check_grad(grad);
  check_rows(payload, shard, grad);
  TORCH_CHECK_VALUE(payload.size(0) * shard >= grad.numel(), "the gradient has ", grad.numel(),
                    " elements, but the shards hold ", payload.size(0) * shard, ": give more rows.");
}

struct QuantizeEncode {
  static constexpr auto schema =
      "quantize_encode(Tensor grad, Tensor(a!)? error, int shard, Tensor(b!) payload, Tensor(c!)? dropped, "
      "bool floating, int? key) -> ()";

  static void check(const Tensor& grad, const OptionalTensor& error, int64_t shard, const Tensor& payload,
                    const OptionalTensor& dropped, bool floating, OptionalKey key) {
    check_shards(payload, shard, grad);
    if (error) check_error(*error, grad);
    check_dropped(dropped, grad);
  }
  static void cpu(const Tensor& grad, const OptionalTensor& error, int64_t shard, const Tensor& payload,
                  const OptionalTensor& dropped, bool floating, OptionalKey key) {
    add_count(dropped, cpu::quantize_encode(grad.const_data_ptr(), grad_type(grad), floats_or_null(error),
                                            grad.numel(), rows_of(payload, shard), code_type(floating),
                                            rounding_by(key), words(payload)));
  }
#ifdef DEAR_WITH_CUDA
  static void cuda(const Tensor& grad, const OptionalTensor& error, int64_t shard, const Tensor& payload,
                   const OptionalTensor& dropped, bool floating, OptionalKey key) {
    const Launch launch(grad);
    cuda::quantize_encode(grad.const_data_ptr(), grad_type(grad), floats_or_null(error), grad.numel(),
                          rows_of(payload, shard), code_type(floating), rounding_by(key), words(payload),
                          words_or_null(dropped), launch.stream());
    launch.check();
  }
#endif
};

struct QuantizeAverage {
  static constexpr auto schema =
      "quantize_average(Tensor payloads, Tensor(a!)? error, int shard, Tensor(b!) out, int numel, "
      "Tensor(c!)? dropped, bool floating, int? key) -> ()";

  static void check(const Tensor& payloads, const OptionalTensor& error, int64_t shard, const Tensor& out,
                    int64_t numel, const OptionalTensor& dropped, bool floating, OptionalKey key) {
    check_rows(payloads, shard, out);
    check_flat(out, at::kInt, "the mean");
    TORCH_CHECK_VALUE(out.numel() == quantized_words(shard), "the mean must hold ", quantized_words(shard),
                      " words, but it holds ", out.numel(), ": allocate it with that size.");
    TORCH_CHECK_VALUE(numel >= 0 && numel <= shard, "numel is ", numel, ", but the shard has ", shard,
                      " elements: pass how many of them exist.");
    if (error) {
      check_flat(*error, at::kFloat, "the error feedback");
      check_same_device(*error, out, "the error feedback", "the mean");
      TORCH_CHECK_VALUE(error->numel() == numel, "the error feedback has ", error->numel(), " elements but ",
                        numel, " of the shard exist: make them equally long.");
    }
    check_dropped(dropped, out);
  }
  static void cpu(const Tensor& payloads, const OptionalTensor& error, int64_t shard, const Tensor& out,
                  int64_t numel, const OptionalTensor& dropped, bool floating, OptionalKey key) {
    add_count(dropped, cpu::quantize_average(payloads.const_data_ptr<int32_t>(), rows_of(payloads, shard),
                                             floats_or_null(error), numel, code_type(floating),
                                             rounding_by(key), words(out)));
  }
#ifdef DEAR_WITH_CUDA
  static void cuda(const Tensor& payloads, const OptionalTensor& error, int64_t shard, const Tensor& out,
                   int64_t numel, const OptionalTensor& dropped, bool floating, OptionalKey key) {
    const Launch launch(out);
    cuda::quantize_average(payloads.const_data_ptr<int32_t>(), rows_of(payloads, shard),
                           floats_or_null(error), numel, code_type(floating), rounding_by(key), words(out),
                           words_or_null(dropped), launch.stream());
    launch.check();
  }
#endif
};

struct QuantizeDecode {
  static constexpr auto schema =
      "quantize_decode(Tensor payload, int shard, Tensor(a!) out, bool floating) -> ()";

  static void check(const Tensor& payload, int64_t shard, const Tensor& out, bool floating) {
    check_shards(payload, shard, out);
  }
  static void cpu(const Tensor& payload, int64_t shard, const Tensor& out, bool floating) {
    cpu::quantize_decode(payload.const_data_ptr<int32_t>(), rows_of(payload, shard), out.numel(),
                         code_type(floating), grad_type(out), out.mutable_data_ptr());
  }
#ifdef DEAR_WITH_CUDA
  static void cuda(const Tensor& payload, int64_t shard, const Tensor& out, bool floating) {
    const Launch launch(out);
    cuda::quantize_decode(payload.const_data_ptr<int32_t>(), rows_of(payload, shard), out.numel(),
                          code_type(floating), grad_type(out), out.mutable_data_ptr(), launch.stream());
    launch.check();
  }
#endif
};

}  // namespace

void quantize_encode(const Tensor& grad, const OptionalTensor& error, int64_t shard, const Tensor& payload,
                     const OptionalTensor& dropped, bool floating, std::optional<int64_t> key) {
  call<QuantizeEncode>(grad, error, shard, payload, dropped, floating, key);
}

void quantize_average(const Tensor& payloads, const OptionalTensor& error, int64_t shard, const Tensor& out,
                      int64_t numel, const OptionalTensor& dropped, bool floating,
                      std::optional<int64_t> key) {
  call<QuantizeAverage>(payloads, error, shard, out, numel, dropped, floating, key);
}

void quantize_decode(const Tensor& payload, int64_t shard, const Tensor& out, bool floating) {
  call<QuantizeDecode>(payload, shard, out, floating);
}

TORCH_LIBRARY_FRAGMENT(dear, m) {
  define<QuantizeEncode>(m);
  define<QuantizeAverage>(m);
  define<QuantizeDecode>(m);
}

}  // namespace dear::compress::ops
