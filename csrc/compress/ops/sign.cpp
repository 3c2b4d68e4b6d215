#include "compress/ops/sign.h"

#include <c10/util/Exception.h>

#include "compress/kernels/cpu/sign.h"
#include "compress/ops/operator.h"
#ifdef DEAR_CUDA_KERNELS
#include "compress/kernels/cuda/sign.h"
#include "compress/ops/launch.h"
#endif

namespace dear::compress::ops {

namespace {

// Blocks in each of a list of payloads: rows of whole sign records. Rows may lie apart, each must be packed.
int64_t sign_blocks(const Tensor& payloads) {
  TORCH_CHECK_TYPE(payloads.scalar_type() == at::kInt, "a sign payload must be Int, but it is ",
                   payloads.scalar_type(), ": view it as int32.");
  TORCH_CHECK_VALUE(payloads.dim() == 2 && payloads.size(0) >= 1 && payloads.size(1) % kSignRecord == 0,
                    "sign payloads must be [voters, blocks * ", kSignRecord, "], but they are ",
                    payloads.sizes(), ": size them with sign_payload_numel.");
  TORCH_CHECK_VALUE(payloads.size(1) <= 1 || payloads.stride(1) == 1,
                    "each sign payload must be contiguous: pass packed rows.");
  return payloads.size(1) / kSignRecord;
}

struct SignEncode {
  static constexpr auto schema =
      "sign_encode(Tensor grad, Tensor(a!)? error, Tensor(b!) payload, Tensor(c!)? dropped, bool scaled) -> "
      "()";

  static void check(const Tensor& grad, const OptionalTensor& error, const Tensor& payload,
                    const OptionalTensor& dropped, bool) {
    check_grad(grad);
    if (error) check_error(*error, grad);
    check_dropped(dropped, grad);
    check_flat(payload, at::kInt, "a sign payload");
    check_same_device(payload, grad, "the payload", "the gradient");
    const int64_t needed = sign_payload_numel(grad.numel());
    TORCH_CHECK_VALUE(payload.numel() % kSignRecord == 0 && payload.numel() >= needed, "the payload has ",
                      payload.numel(), " words, but ", grad.numel(), " elements need at least ", needed,
                      ", in multiples of ", kSignRecord, ": size it with sign_payload_numel.");
  }
  static void cpu(const Tensor& grad, const OptionalTensor& error, const Tensor& payload,
                  const OptionalTensor& dropped, bool scaled) {
    add_count(dropped, cpu::sign_encode(grad.const_data_ptr(), grad_type(grad), floats_or_null(error),
                                        grad.numel(), words(payload), payload.numel() / kSignRecord, scaled));
  }
#ifdef DEAR_CUDA_KERNELS
  static void cuda(const Tensor& grad, const OptionalTensor& error, const Tensor& payload,
                   const OptionalTensor& dropped, bool scaled) {
    const Launch launch(grad);
    cuda::sign_encode(grad.const_data_ptr(), grad_type(grad), floats_or_null(error), grad.numel(),
                      words(payload), payload.numel() / kSignRecord, scaled, words_or_null(dropped),
                      launch.stream());
    launch.check();
  }
#endif
};

struct SignVote {
  static constexpr auto schema = "sign_vote(Tensor payloads, Tensor(a!) out, int tie_breaker) -> ()";

  static void check(const Tensor& payloads, const Tensor& out, int64_t tie_breaker) {
    const int64_t blocks = sign_blocks(payloads);
    check_flat(out, at::kInt, "the voted payload");
    check_same_device(out, payloads, "the voted payload", "the ballots");
    TORCH_CHECK_VALUE(out.numel() == blocks * kSignRecord, "the voted payload has ", out.numel(),
                      " words but the ballots have ", blocks * kSignRecord, " each: make them equally long.");
    TORCH_CHECK_VALUE(payloads.size(0) < (1 << 17), "at most 131071 voters are counted, but there are ",
                      payloads.size(0), ": vote in groups.");
    TORCH_CHECK_VALUE(tie_breaker >= 0 && tie_breaker < payloads.size(0), "the tie breaker is voter ",
                      tie_breaker, ", but there are ", payloads.size(0), " voters: pass one of them.");
  }
  static void cpu(const Tensor& payloads, const Tensor& out, int64_t tie_breaker) {
    cpu::sign_vote(payloads.const_data_ptr<int32_t>(), payloads.size(0), payloads.stride(0),
                   out.numel() / kSignRecord, tie_breaker, words(out));
  }
#ifdef DEAR_CUDA_KERNELS
  static void cuda(const Tensor& payloads, const Tensor& out, int64_t tie_breaker) {
    const Launch launch(out);
    cuda::sign_vote(payloads.const_data_ptr<int32_t>(), payloads.size(0), payloads.stride(0),
                    out.numel() / kSignRecord, tie_breaker, words(out), launch.stream());
    launch.check();
  }
#endif
};

struct SignAverage {
  static constexpr auto schema =
      "sign_average(Tensor payloads, Tensor(a!)? error, Tensor(b!) out, int numel, Tensor(c!)? dropped=None) "
      "-> ()";

  static void check(const Tensor& payloads, const OptionalTensor& error, const Tensor& out, int64_t numel,
                    const OptionalTensor& dropped) {
    SignVote::check(payloads, out, 0);
    const int64_t blocks = sign_blocks(payloads);
    TORCH_CHECK_VALUE(numel >= 0 && numel <= blocks * kBlock, "the shard has ", numel,
                      " elements, but its payload holds at most ", blocks * kBlock, ": pass matching sizes.");
    if (error) {
      check_flat(*error, at::kFloat, "the error feedback");
      check_same_device(*error, out, "the error feedback", "the payload");
      TORCH_CHECK_VALUE(error->numel() == numel, "the error feedback has ", error->numel(),
                        " elements but the shard has ", numel, ": make them equally long.");
    }
    check_dropped(dropped, out);
  }
  static void cpu(const Tensor& payloads, const OptionalTensor& error, const Tensor& out, int64_t numel,
                  const OptionalTensor& dropped) {
    add_count(dropped,
              cpu::sign_average(payloads.const_data_ptr<int32_t>(), payloads.size(0), payloads.stride(0),
                                out.numel() / kSignRecord, floats_or_null(error), numel, words(out)));
  }
#ifdef DEAR_CUDA_KERNELS
  static void cuda(const Tensor& payloads, const OptionalTensor& error, const Tensor& out, int64_t numel,
                   const OptionalTensor& dropped) {
    const Launch launch(out);
    cuda::sign_average(payloads.const_data_ptr<int32_t>(), payloads.size(0), payloads.stride(0),
                       out.numel() / kSignRecord, floats_or_null(error), numel, words(out),
                       words_or_null(dropped), launch.stream());
    launch.check();
  }
#endif
};

struct SignDecode {
  static constexpr auto schema = "sign_decode(Tensor payload, Tensor(a!) out) -> ()";

  static void check(const Tensor& payload, const Tensor& out) {
    check_grad(out);
    check_flat(payload, at::kInt, "a sign payload");
    check_same_device(payload, out, "the payload", "the gradient");
    const int64_t needed = sign_payload_numel(out.numel());
    TORCH_CHECK_VALUE(payload.numel() >= needed, "the payload has ", payload.numel(), " words, but ",
                      out.numel(), " elements need ", needed, ": pass the whole payload.");
  }
  static void cpu(const Tensor& payload, const Tensor& out) {
    cpu::sign_decode(payload.const_data_ptr<int32_t>(), out.numel(), grad_type(out), out.mutable_data_ptr());
  }
#ifdef DEAR_CUDA_KERNELS
  static void cuda(const Tensor& payload, const Tensor& out) {
    const Launch launch(out);
    cuda::sign_decode(payload.const_data_ptr<int32_t>(), out.numel(), grad_type(out), out.mutable_data_ptr(),
                      launch.stream());
    launch.check();
  }
#endif
};

}  // namespace

void sign_encode(const Tensor& grad, const OptionalTensor& error, const Tensor& payload,
                 const OptionalTensor& dropped, bool scaled) {
  call<SignEncode>(grad, error, payload, dropped, scaled);
}

void sign_vote(const Tensor& payloads, const Tensor& out, int64_t tie_breaker) {
  call<SignVote>(payloads, out, tie_breaker);
}

void sign_average(const Tensor& payloads, const OptionalTensor& error, const Tensor& out, int64_t numel,
                  const OptionalTensor& dropped) {
  call<SignAverage>(payloads, error, out, numel, dropped);
}

void sign_decode(const Tensor& payload, const Tensor& out) { call<SignDecode>(payload, out); }

TORCH_LIBRARY_FRAGMENT(dear, m) {
  define<SignEncode>(m);
  define<SignVote>(m);
  define<SignAverage>(m);
  define<SignDecode>(m);
}

}  // namespace dear::compress::ops
