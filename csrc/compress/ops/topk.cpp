#include "compress/ops/topk.h"

#include <c10/util/Exception.h>

#include "compress/kernels/cpu/topk.h"
#include "compress/ops/operator.h"
#ifdef DEAR_CUDA_KERNELS
#include "compress/kernels/cuda/topk.h"
#include "compress/ops/launch.h"
#endif

namespace dear::compress::ops {

namespace {

// By how many elements a threshold may miss k and yet be kept.
int64_t slack_of(double tolerance, int64_t k) {
  return static_cast<int64_t>(tolerance * static_cast<double>(k));
}

int64_t capacity_of(const Tensor& slots) { return (slots.size(1) - kSlotHeader) / 2; }

Slots slots_of(const Tensor& payload, int64_t shard_numel) {
  return {words(payload), payload.size(0), capacity_of(payload), shard_numel};
}

Correction correction(const OptionalTensor& grad, const Tensor& error) {
  return {data_or_null(grad), type_or_float(grad), floats(error), error.numel()};
}

void check_slots(const Tensor& payloads) {
  check_flat(payloads, at::kInt, "a sparse payload");
  TORCH_CHECK_VALUE(payloads.dim() == 2 && payloads.size(0) >= 1 && payloads.size(1) >= slot_words(1) &&
                        payloads.size(1) % 2 == 1,
                    "sparse payloads must be [slots, 1 + 2 * capacity], but they are ", payloads.sizes(),
                    ": size them with topk_slot_numel.");
}

void check_shards_of(int64_t numel, int64_t shard_numel, int64_t owners) {
  TORCH_CHECK_VALUE(shard_numel >= 1 && (owners == 1 || shard_numel % kBlock == 0), "the shard length is ",
                    shard_numel, ", but with several owners it must be a multiple of ", kBlock,
                    ": round it up.");
  TORCH_CHECK_VALUE(shard_numel * owners >= numel, owners, " shards of ", shard_numel,
                    " elements do not cover the ", numel, " elements of the group: use longer shards.");
}

void check_threshold(const Tensor& threshold, const Tensor& error) {
  check_flat(threshold, at::kFloat, "the threshold");
  check_same_device(threshold, error, "the threshold", "the error feedback");
  TORCH_CHECK_VALUE(threshold.numel() == 1, "the threshold must hold one float32, but it holds ",
                    threshold.numel(), ": allocate it with that size.");
}

struct TopKThreshold {
  static constexpr auto schema =
      "topk_threshold(Tensor? grad, Tensor error, int k, Tensor(a!) threshold, Tensor(b!) ties, "
      "Tensor(c!) workspace) -> ()";

  static void check(const OptionalTensor& grad, const Tensor& error, int64_t k, const Tensor& threshold,
                    const Tensor& ties, const Tensor& workspace) {
    if (grad) check_grad(*grad);
    check_error(error, grad ? *grad : error);
    TORCH_CHECK_VALUE(k >= 1 && k <= error.numel(), "k is ", k, ", but it must lie between 1 and the ",
                      error.numel(), " elements of the group: choose a density in (0, 1].");
    check_threshold(threshold, error);
    check_counter(ties, 1, error, "the number of ties");
    check_workspace(workspace, at::kInt, topk_workspace_numel(error.numel()), error);
  }
  static void cpu(const OptionalTensor& grad, const Tensor& error, int64_t k, const Tensor& threshold,
                  const Tensor& ties, const Tensor&) {
    cpu::topk_threshold(data_or_null(grad), type_or_float(grad), error.const_data_ptr<float>(), error.numel(),
                        k, floats(threshold), words(ties));
  }
#ifdef DEAR_CUDA_KERNELS
  static void cuda(const OptionalTensor& grad, const Tensor& error, int64_t k, const Tensor& threshold,
                   const Tensor& ties, const Tensor& workspace) {
    const Launch launch(error);
    cuda::topk_threshold(data_or_null(grad), type_or_float(grad), error.const_data_ptr<float>(),
                         error.numel(), k, floats(threshold), words(ties), words(workspace), launch.stream());
    launch.check();
  }
#endif
};

struct TopKRefresh {
  static constexpr auto schema =
      "topk_refresh(Tensor? grad, Tensor error, int k, Tensor(a!) threshold, Tensor(b!) ties, "
      "Tensor(c!) workspace, float tolerance) -> ()";

  static void check(const OptionalTensor& grad, const Tensor& error, int64_t k, const Tensor& threshold,
                    const Tensor& ties, const Tensor& workspace, double tolerance) {
    TopKThreshold::check(grad, error, k, threshold, ties, workspace);
    TORCH_CHECK_VALUE(tolerance >= 0 && tolerance < 1, "the tolerance is ", tolerance,
                      ", but it must lie in [0, 1): pass a share of k.");
  }
  static void cpu(const OptionalTensor& grad, const Tensor& error, int64_t k, const Tensor& threshold,
                  const Tensor& ties, const Tensor&, double tolerance) {
    cpu::topk_refresh(data_or_null(grad), type_or_float(grad), error.const_data_ptr<float>(), error.numel(),
                      k, slack_of(tolerance, k), floats(threshold), words(ties));
  }
#ifdef DEAR_CUDA_KERNELS
  static void cuda(const OptionalTensor& grad, const Tensor& error, int64_t k, const Tensor& threshold,
                   const Tensor& ties, const Tensor& workspace, double tolerance) {
    const Launch launch(error);
    cuda::topk_refresh(data_or_null(grad), type_or_float(grad), error.const_data_ptr<float>(), error.numel(),
                       k, slack_of(tolerance, k), floats(threshold), words(ties), words(workspace),
                       launch.stream());
    launch.check();
  }
#endif
};

struct TopKSelect {
  static constexpr auto schema =
      "topk_select(Tensor? grad, Tensor(a!) error, Tensor threshold, Tensor? ties, int shard_numel, "
      "Tensor(b!) payload, Tensor(c!) stats, Tensor(d!) workspace) -> ()";

  static void check(const OptionalTensor& grad, const Tensor& error, const Tensor& threshold,
                    const OptionalTensor& ties, int64_t shard_numel, const Tensor& payload,
                    const Tensor& stats, const Tensor& workspace) {
    if (grad) check_grad(*grad);
    check_error(error, grad ? *grad : error);
    check_threshold(threshold, error);
    if (ties) check_counter(*ties, 1, error, "the number of ties");
    check_counter(stats, 2, error, "the statistics");
    check_slots(payload);
    check_same_device(payload, error, "the payload", "the error feedback");
    check_shards_of(error.numel(), shard_numel, payload.size(0));
    check_workspace(workspace, at::kInt, topk_workspace_numel(error.numel()), error);
  }
  static void cpu(const OptionalTensor& grad, const Tensor& error, const Tensor& threshold,
                  const OptionalTensor& ties, int64_t shard_numel, const Tensor& payload, const Tensor& stats,
                  const Tensor& workspace) {
    int32_t* masks = words(workspace);
    const auto counts =
        cpu::topk_select(correction(grad, error), *threshold.const_data_ptr<float>(),
                         ties ? *ties->const_data_ptr<int32_t>() : -1, slots_of(payload, shard_numel), masks,
                         masks + topk_mask_words(error.numel()));
    words(stats)[0] += static_cast<int32_t>(counts.found);
    words(stats)[1] += static_cast<int32_t>(counts.dropped);
  }
#ifdef DEAR_CUDA_KERNELS
  static void cuda(const OptionalTensor& grad, const Tensor& error, const Tensor& threshold,
                   const OptionalTensor& ties, int64_t shard_numel, const Tensor& payload,
                   const Tensor& stats, const Tensor& workspace) {
    const Launch launch(error);
    cuda::topk_select(correction(grad, error), threshold.const_data_ptr<float>(),
                      ties ? ties->const_data_ptr<int32_t>() : nullptr, slots_of(payload, shard_numel),
                      words(stats), words(workspace), launch.stream());
    launch.check();
  }
#endif
};

struct TopKAccumulate {
  static constexpr auto schema =
      "topk_accumulate(Tensor payloads, Tensor(a!) dense, float alpha, Tensor(b!)? dropped=None) -> ()";

  static void check(const Tensor& payloads, const Tensor& dense, double, const OptionalTensor& dropped) {
    check_slots(payloads);
    check_flat(dense, at::kFloat, "the dense shard");
    check_same_device(dense, payloads, "the dense shard", "the payloads");
    check_dropped(dropped, dense);
  }
  static void cpu(const Tensor& payloads, const Tensor& dense, double alpha, const OptionalTensor& dropped) {
    add_count(dropped, cpu::topk_accumulate(payloads.const_data_ptr<int32_t>(), payloads.size(0),
                                            capacity_of(payloads), static_cast<float>(alpha), floats(dense),
                                            dense.numel()));
  }
#ifdef DEAR_CUDA_KERNELS
  static void cuda(const Tensor& payloads, const Tensor& dense, double alpha, const OptionalTensor& dropped) {
    const Launch launch(dense);
    cuda::topk_accumulate(payloads.const_data_ptr<int32_t>(), payloads.size(0), capacity_of(payloads),
                          static_cast<float>(alpha), floats(dense), dense.numel(), words_or_null(dropped),
                          launch.stream());
    launch.check();
  }
#endif
};

struct TopKDecode {
  static constexpr auto schema =
      "topk_decode(Tensor payloads, Tensor(a!) out, int shard_numel, float alpha) -> ()";

  static void check(const Tensor& payloads, const Tensor& out, int64_t shard_numel, double) {
    check_grad(out);
    check_slots(payloads);
    check_same_device(payloads, out, "the payloads", "the gradient");
    check_shards_of(out.numel(), shard_numel, payloads.size(0));
  }
  static void cpu(const Tensor& payloads, const Tensor& out, int64_t shard_numel, double alpha) {
    cpu::topk_decode(payloads.const_data_ptr<int32_t>(), payloads.size(0), capacity_of(payloads), shard_numel,
                     static_cast<float>(alpha), grad_type(out), out.mutable_data_ptr(), out.numel());
  }
#ifdef DEAR_CUDA_KERNELS
  static void cuda(const Tensor& payloads, const Tensor& out, int64_t shard_numel, double alpha) {
    const Launch launch(out);
    cuda::topk_decode(payloads.const_data_ptr<int32_t>(), payloads.size(0), capacity_of(payloads),
                      shard_numel, static_cast<float>(alpha), grad_type(out), out.mutable_data_ptr(),
                      out.numel(), launch.stream());
    launch.check();
  }
#endif
};

}  // namespace

void topk_threshold(const OptionalTensor& grad, const Tensor& error, int64_t k, const Tensor& threshold,
                    const Tensor& ties, const Tensor& workspace) {
  call<TopKThreshold>(grad, error, k, threshold, ties, workspace);
}

void topk_refresh(const OptionalTensor& grad, const Tensor& error, int64_t k, const Tensor& threshold,
                  const Tensor& ties, const Tensor& workspace, double tolerance) {
  call<TopKRefresh>(grad, error, k, threshold, ties, workspace, tolerance);
}

void topk_select(const OptionalTensor& grad, const Tensor& error, const Tensor& threshold,
                 const OptionalTensor& ties, int64_t shard_numel, const Tensor& payload, const Tensor& stats,
                 const Tensor& workspace) {
  call<TopKSelect>(grad, error, threshold, ties, shard_numel, payload, stats, workspace);
}

void topk_accumulate(const Tensor& payloads, const Tensor& dense, double alpha,
                     const OptionalTensor& dropped) {
  call<TopKAccumulate>(payloads, dense, alpha, dropped);
}

void topk_decode(const Tensor& payloads, const Tensor& out, int64_t shard_numel, double alpha) {
  call<TopKDecode>(payloads, out, shard_numel, alpha);
}

TORCH_LIBRARY_FRAGMENT(dear, m) {
  define<TopKThreshold>(m);
  define<TopKRefresh>(m);
  define<TopKSelect>(m);
  define<TopKAccumulate>(m);
  define<TopKDecode>(m);
}

}  // namespace dear::compress::ops
