#include "compress/ops/levels.h"

#include <c10/util/Exception.h>

#include "compress/kernels/cpu/levels.h"
#include "compress/ops/operator.h"
#include "compress/ops/scaled_rows.h"
#ifdef DEAR_CUDA_KERNELS
#include "compress/kernels/cuda/levels.h"
#include "compress/ops/launch.h"
#endif

namespace dear::compress::ops {

namespace {

int64_t words_of(int64_t shard, int64_t bits) {
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 4, "bits must be 2, 3 or 4, not ", bits, ".");
  return levelled_words(shard, bits);
}

void check_squares(const OptionalTensor& squares, int64_t numel, const Tensor& data) {
  if (!squares) return;
  check_flat(*squares, at::kFloat, "the mean squares");
  check_same_device(*squares, data, "the mean squares", "the data");
  TORCH_CHECK_VALUE(squares->numel() == numel, "there are ", squares->numel(), " mean squares of ", numel,
                    " elements: make them equally long.");
}

struct LevelsEncode {
  static constexpr auto schema =
      "levels_encode(Tensor grad, Tensor(a!)? error, int shard, Tensor(b!) payload, Tensor(c!)? dropped, "
      "int bits, Tensor? squares=None) -> ()";

  static void check(const Tensor& grad, const OptionalTensor& error, int64_t shard, const Tensor& payload,
                    const OptionalTensor& dropped, int64_t bits, const OptionalTensor& squares) {
    check_shards(payload, shard, words_of(shard, bits), grad);
    if (error) check_error(*error, grad);
    check_dropped(dropped, grad);
    check_squares(squares, grad.numel(), grad);
  }
  static void cpu(const Tensor& grad, const OptionalTensor& error, int64_t shard, const Tensor& payload,
                  const OptionalTensor& dropped, int64_t bits, const OptionalTensor& squares) {
    add_count(dropped, cpu::levels_encode(grad.const_data_ptr(), grad_type(grad), floats_or_null(error),
                                          floats_or_null(squares), grad.numel(), rows_of(payload, shard),
                                          static_cast<int>(bits), words(payload)));
  }
#ifdef DEAR_CUDA_KERNELS
  static void cuda(const Tensor& grad, const OptionalTensor& error, int64_t shard, const Tensor& payload,
                   const OptionalTensor& dropped, int64_t bits, const OptionalTensor& squares) {
    const Launch launch(grad);
    cuda::levels_encode(grad.const_data_ptr(), grad_type(grad), floats_or_null(error),
                        floats_or_null(squares), grad.numel(), rows_of(payload, shard),
                        static_cast<int>(bits), words(payload), words_or_null(dropped), launch.stream());
    launch.check();
  }
#endif
};

struct LevelsAverage {
  static constexpr auto schema =
      "levels_average(Tensor payloads, Tensor(a!)? error, int shard, Tensor(b!) out, int numel, "
      "Tensor(c!)? dropped, int bits, Tensor? squares=None) -> ()";

  static void check(const Tensor& payloads, const OptionalTensor& error, int64_t shard, const Tensor& out,
                    int64_t numel, const OptionalTensor& dropped, int64_t bits,
                    const OptionalTensor& squares) {
    check_rows(payloads, shard, words_of(shard, bits), out);
    check_mean(out, shard, words_of(shard, bits), numel, error);
    check_dropped(dropped, out);
    check_squares(squares, numel, out);
  }
  static void cpu(const Tensor& payloads, const OptionalTensor& error, int64_t shard, const Tensor& out,
                  int64_t numel, const OptionalTensor& dropped, int64_t bits, const OptionalTensor& squares) {
    add_count(dropped, cpu::levels_average(payloads.const_data_ptr<int32_t>(), rows_of(payloads, shard),
                                           floats_or_null(error), floats_or_null(squares), numel,
                                           static_cast<int>(bits), words(out)));
  }
#ifdef DEAR_CUDA_KERNELS
  static void cuda(const Tensor& payloads, const OptionalTensor& error, int64_t shard, const Tensor& out,
                   int64_t numel, const OptionalTensor& dropped, int64_t bits,
                   const OptionalTensor& squares) {
    const Launch launch(out);
    cuda::levels_average(payloads.const_data_ptr<int32_t>(), rows_of(payloads, shard), floats_or_null(error),
                         floats_or_null(squares), numel, static_cast<int>(bits), words(out),
                         words_or_null(dropped), launch.stream());
    launch.check();
  }
#endif
};

struct LevelsDecode {
  static constexpr auto schema =
      "levels_decode(Tensor payload, int shard, Tensor(a!) out, int bits, Tensor(b!)? squares=None) -> ()";

  static void check(const Tensor& payload, int64_t shard, const Tensor& out, int64_t bits,
                    const OptionalTensor& squares) {
    check_shards(payload, shard, words_of(shard, bits), out);
    check_squares(squares, out.numel(), out);
  }
  static void cpu(const Tensor& payload, int64_t shard, const Tensor& out, int64_t bits,
                  const OptionalTensor& squares) {
    cpu::levels_decode(payload.const_data_ptr<int32_t>(), rows_of(payload, shard), out.numel(),
                       static_cast<int>(bits), grad_type(out), floats_or_null(squares),
                       out.mutable_data_ptr());
  }
#ifdef DEAR_CUDA_KERNELS
  static void cuda(const Tensor& payload, int64_t shard, const Tensor& out, int64_t bits,
                   const OptionalTensor& squares) {
    const Launch launch(out);
    cuda::levels_decode(payload.const_data_ptr<int32_t>(), rows_of(payload, shard), out.numel(),
                        static_cast<int>(bits), grad_type(out), floats_or_null(squares),
                        out.mutable_data_ptr(), launch.stream());
    launch.check();
  }
#endif
};

}  // namespace

void levels_encode(const Tensor& grad, const OptionalTensor& error, int64_t shard, const Tensor& payload,
                   const OptionalTensor& dropped, int64_t bits, const OptionalTensor& squares) {
  call<LevelsEncode>(grad, error, shard, payload, dropped, bits, squares);
}

void levels_average(const Tensor& payloads, const OptionalTensor& error, int64_t shard, const Tensor& out,
                    int64_t numel, const OptionalTensor& dropped, int64_t bits,
                    const OptionalTensor& squares) {
  call<LevelsAverage>(payloads, error, shard, out, numel, dropped, bits, squares);
}

void levels_decode(const Tensor& payload, int64_t shard, const Tensor& out, int64_t bits,
                   const OptionalTensor& squares) {
  call<LevelsDecode>(payload, shard, out, bits, squares);
}

TORCH_LIBRARY_FRAGMENT(dear, m) {
  define<LevelsEncode>(m);
  define<LevelsAverage>(m);
  define<LevelsDecode>(m);
}

}  // namespace dear::compress::ops
