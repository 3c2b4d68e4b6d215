#include "compress/ops/quantize.h"

#include "compress/kernels/cpu/quantize.h"
#include "compress/ops/operator.h"
#include "compress/ops/scaled_rows.h"
#ifdef DEAR_CUDA_KERNELS
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
struct QuantizeEncode {
  static constexpr auto schema =
      "quantize_encode(Tensor grad, Tensor(a!)? error, int shard, Tensor(b!) payload, Tensor(c!)? dropped, "
      "bool floating, int? key) -> ()";

  static void check(const Tensor& grad, const OptionalTensor& error, int64_t shard, const Tensor& payload,
                    const OptionalTensor& dropped, bool floating, OptionalKey key) {
    check_shards(payload, shard, quantized_words(shard), grad);
    if (error) check_error(*error, grad);
    check_dropped(dropped, grad);
  }
  static void cpu(const Tensor& grad, const OptionalTensor& error, int64_t shard, const Tensor& payload,
                  const OptionalTensor& dropped, bool floating, OptionalKey key) {
    add_count(dropped, cpu::quantize_encode(grad.const_data_ptr(), grad_type(grad), floats_or_null(error),
                                            grad.numel(), rows_of(payload, shard), code_type(floating),
                                            rounding_by(key), words(payload)));
  }
#ifdef DEAR_CUDA_KERNELS
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
    check_rows(payloads, shard, quantized_words(shard), out);
    check_mean(out, shard, quantized_words(shard), numel, error);
    check_dropped(dropped, out);
  }
  static void cpu(const Tensor& payloads, const OptionalTensor& error, int64_t shard, const Tensor& out,
                  int64_t numel, const OptionalTensor& dropped, bool floating, OptionalKey key) {
    add_count(dropped, cpu::quantize_average(payloads.const_data_ptr<int32_t>(), rows_of(payloads, shard),
                                             floats_or_null(error), numel, code_type(floating),
                                             rounding_by(key), words(out)));
  }
#ifdef DEAR_CUDA_KERNELS
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
    check_shards(payload, shard, quantized_words(shard), out);
  }
  static void cpu(const Tensor& payload, int64_t shard, const Tensor& out, bool floating) {
    cpu::quantize_decode(payload.const_data_ptr<int32_t>(), rows_of(payload, shard), out.numel(),
                         code_type(floating), grad_type(out), out.mutable_data_ptr());
  }
#ifdef DEAR_CUDA_KERNELS
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
