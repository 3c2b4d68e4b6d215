#include "compress/ops_checks.h"

#include <c10/util/Exception.h>

#include <limits>

#include "compress/ops.h"

namespace dear::compress {

namespace {

void check_flat(const at::Tensor& tensor, at::ScalarType type, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, name, " must be ", type, ", but it is ",
                   tensor.scalar_type(), ": convert it first.");
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous: pass a flat, packed buffer.");
}

void check_same_device(const at::Tensor& a, const at::Tensor& b, const char* a_name, const char* b_name) {
  TORCH_CHECK_VALUE(a.device() == b.device(), a_name, " is on ", a.device(), " but ", b_name, " is on ",
                    b.device(), ": keep them on one device.");
}

void check_grad(const at::Tensor& grad) {
  grad_type(grad);
  TORCH_CHECK_VALUE(grad.is_contiguous(), "the gradient must be contiguous: pass a flat, packed buffer.");
  TORCH_CHECK_VALUE(grad.numel() <= std::numeric_limits<int32_t>::max(), "the gradient has ", grad.numel(),
                    " elements, more than an int32 index can name: use smaller fusion groups.");
}

void check_error(const at::Tensor& error, const at::Tensor& grad) {
  check_flat(error, at::kFloat, "the error feedback");
  check_same_device(error, grad, "the error feedback", "the gradient");
  TORCH_CHECK_VALUE(error.numel() == grad.numel(), "the error feedback has ", error.numel(),
                    " elements but the gradient has ", grad.numel(), ": make them equally long.");
}

void check_counter(const at::Tensor& counter, int64_t numel, const at::Tensor& grad, const char* name) {
  check_flat(counter, at::kInt, name);
  check_same_device(counter, grad, name, "the gradient");
  TORCH_CHECK_VALUE(counter.numel() == numel, name, " must hold ", numel, " int32, but it holds ",
                    counter.numel(), ": allocate it with that size.");
}

// A list of payloads: rows of whole sign records. Rows may lie apart, each must be packed.
int64_t sign_blocks(const at::Tensor& payloads) {
  TORCH_CHECK_TYPE(payloads.scalar_type() == at::kInt, "a sign payload must be Int, but it is ",
                   payloads.scalar_type(), ": view it as int32.");
  TORCH_CHECK_VALUE(payloads.dim() == 2 && payloads.size(0) >= 1 && payloads.size(1) % kSignRecord == 0,
                    "sign payloads must be [voters, blocks * ", kSignRecord, "], but they are ",
                    payloads.sizes(), ": size them with sign_payload_numel.");
  TORCH_CHECK_VALUE(payloads.size(1) <= 1 || payloads.stride(1) == 1,
                    "each sign payload must be contiguous: pass packed rows.");
  return payloads.size(1) / kSignRecord;
}

int64_t slot_capacity(const at::Tensor& payloads) {
  check_flat(payloads, at::kInt, "a sparse payload");
  TORCH_CHECK_VALUE(payloads.dim() == 2 && payloads.size(0) >= 1 && payloads.size(1) >= slot_words(1) &&
                        payloads.size(1) % 2 == 1,
                    "sparse payloads must be [slots, 1 + 2 * capacity], but they are ", payloads.sizes(),
                    ": size them with topk_slot_numel.");
  return (payloads.size(1) - kSlotHeader) / 2;
}

void check_shards(int64_t numel, int64_t shard_numel, int64_t owners) {
  TORCH_CHECK_VALUE(shard_numel >= 1 && (owners == 1 || shard_numel % kBlock == 0), "the shard length is ",
                    shard_numel, ", but with several owners it must be a multiple of ", kBlock,
                    ": round it up.");
  TORCH_CHECK_VALUE(shard_numel * owners >= numel, owners, " shards of ", shard_numel,
                    " elements do not cover the ", numel, " elements of the group: use longer shards.");
}

void check_workspace(const at::Tensor& workspace, at::ScalarType type, int64_t numel,
                     const at::Tensor& data) {
  check_flat(workspace, type, "the workspace");
  check_same_device(workspace, data, "the workspace", "the data");
  TORCH_CHECK_VALUE(workspace.numel() >= numel, "the workspace has ", workspace.numel(), " elements but ",
                    numel, " are needed: allocate that many.");
}

// A factor of a batch of matrices: [count, length, rank].
void check_factor(const at::Tensor& factor, const at::Tensor& data, int64_t count, int64_t length,
                  int64_t rank, const char* name) {
  check_flat(factor, at::kFloat, name);
  check_same_device(factor, data, name, "the matrices");
  TORCH_CHECK_VALUE(
      factor.dim() == 3 && factor.size(0) == count && factor.size(1) == length && factor.size(2) == rank,
      name, " must be [", count, ", ", length, ", ", rank, "], but it is ", factor.sizes(),
      ": allocate it with that shape.");
}

void check_rank(int64_t rank) {
  TORCH_CHECK_VALUE(rank >= 1 && rank <= kMaxRank, "the rank is ", rank, ", but it must lie between 1 and ",
                    kMaxRank, ": use such a rank.");
}

void check_table(const at::Tensor& table, int64_t numel, const at::Tensor& data, const char* name) {
  check_flat(table, at::kLong, name);
  check_same_device(table, data, name, "the data");
  TORCH_CHECK_VALUE(table.numel() == numel, name, " must hold ", numel, " int64, but it holds ",
                    table.numel(), ": pass one entry for each.");
}

}  // namespace

GradType grad_type(const at::Tensor& grad) {
  switch (grad.scalar_type()) {
    case at::kFloat:
      return GradType::kFloat32;
    case at::kHalf:
      return GradType::kFloat16;
    case at::kBFloat16:
      return GradType::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, "gradients must be float32, float16 or bfloat16, but this one is ",
                       grad.scalar_type(), ": convert it, or leave the parameter uncompressed.");
  }
}

void check_error_correct(const at::Tensor& grad, const at::Tensor& error, const OptionalTensor& dropped) {
  check_grad(grad);
  check_error(error, grad);
  if (dropped) check_counter(*dropped, 1, grad, "the counter of dropped elements");
}

void check_sign_encode(const at::Tensor& grad, const OptionalTensor& error, const at::Tensor& payload,
                       const OptionalTensor& dropped) {
  check_grad(grad);
  if (error) check_error(*error, grad);
  if (dropped) check_counter(*dropped, 1, grad, "the counter of dropped elements");
  check_flat(payload, at::kInt, "a sign payload");
  check_same_device(payload, grad, "the payload", "the gradient");
  TORCH_CHECK_VALUE(
      payload.numel() % kSignRecord == 0 && payload.numel() / kSignRecord >= block_count(grad.numel()),
      "the payload has ", payload.numel(), " words, but ", grad.numel(), " elements need at least ",
      block_count(grad.numel()) * kSignRecord, ", in multiples of ", kSignRecord,
      ": size it with sign_payload_numel.");
}

void check_sign_vote(const at::Tensor& payloads, const at::Tensor& out, int64_t tie_breaker) {
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

void check_sign_average(const at::Tensor& payloads, const OptionalTensor& error, const at::Tensor& out,
                        int64_t numel) {
  check_sign_vote(payloads, out, 0);
  const int64_t blocks = sign_blocks(payloads);
  TORCH_CHECK_VALUE(numel >= 0 && numel <= blocks * kBlock, "the shard has ", numel,
                    " elements, but its payload holds at most ", blocks * kBlock, ": pass matching sizes.");
  if (error) {
    check_flat(*error, at::kFloat, "the error feedback");
    check_same_device(*error, out, "the error feedback", "the payload");
    TORCH_CHECK_VALUE(error->numel() == numel, "the error feedback has ", error->numel(),
                      " elements but the shard has ", numel, ": make them equally long.");
  }
}

void check_sign_decode(const at::Tensor& payload, const at::Tensor& out) {
  check_grad(out);
  check_flat(payload, at::kInt, "a sign payload");
  check_same_device(payload, out, "the payload", "the gradient");
  TORCH_CHECK_VALUE(payload.numel() >= block_count(out.numel()) * kSignRecord, "the payload has ",
                    payload.numel(), " words, but ", out.numel(), " elements need ",
                    block_count(out.numel()) * kSignRecord, ": pass the whole payload.");
}

void check_topk_threshold(const OptionalTensor& grad, const at::Tensor& error, int64_t k,
                          const at::Tensor& threshold, const at::Tensor& ties, const at::Tensor& workspace) {
  if (grad) check_grad(*grad);
  check_error(error, grad ? *grad : error);
  TORCH_CHECK_VALUE(k >= 1 && k <= error.numel(), "k is ", k, ", but it must lie between 1 and the ",
                    error.numel(), " elements of the group: choose a density in (0, 1].");
  check_flat(threshold, at::kFloat, "the threshold");
  check_same_device(threshold, error, "the threshold", "the error feedback");
  TORCH_CHECK_VALUE(threshold.numel() == 1, "the threshold must hold one float32, but it holds ",
                    threshold.numel(), ": allocate it with that size.");
  check_counter(ties, 1, error, "the number of ties");
  check_workspace(workspace, at::kInt, ops::topk_workspace(error.numel()), error);
}

void check_topk_refresh(const OptionalTensor& grad, const at::Tensor& error, int64_t k,
                        const at::Tensor& threshold, const at::Tensor& ties, const at::Tensor& workspace,
                        double tolerance) {
  check_topk_threshold(grad, error, k, threshold, ties, workspace);
  TORCH_CHECK_VALUE(tolerance >= 0 && tolerance < 1, "the tolerance is ", tolerance,
                    ", but it must lie in [0, 1): pass a share of k.");
}

void check_topk_select(const OptionalTensor& grad, const at::Tensor& error, const at::Tensor& threshold,
                       const OptionalTensor& ties, int64_t shard_numel, const at::Tensor& payload,
                       const at::Tensor& stats, const at::Tensor& workspace) {
  if (grad) check_grad(*grad);
  check_error(error, grad ? *grad : error);
  check_flat(threshold, at::kFloat, "the threshold");
  check_same_device(threshold, error, "the threshold", "the error feedback");
  TORCH_CHECK_VALUE(threshold.numel() == 1, "the threshold must hold one float32, but it holds ",
                    threshold.numel(), ": allocate it with that size.");
  if (ties) check_counter(*ties, 1, error, "the number of ties");
  check_counter(stats, 2, error, "the statistics");
  slot_capacity(payload);
  check_same_device(payload, error, "the payload", "the error feedback");
  check_shards(error.numel(), shard_numel, payload.size(0));
  check_workspace(workspace, at::kInt, ops::topk_workspace(error.numel()), error);
}

void check_topk_accumulate(const at::Tensor& payloads, const at::Tensor& dense) {
  slot_capacity(payloads);
  check_flat(dense, at::kFloat, "the dense shard");
  check_same_device(dense, payloads, "the dense shard", "the payloads");
}

void check_topk_decode(const at::Tensor& payloads, const at::Tensor& out, int64_t shard_numel) {
  check_grad(out);
  slot_capacity(payloads);
  check_same_device(payloads, out, "the payloads", "the gradient");
  check_shards(out.numel(), shard_numel, payloads.size(0));
}

void check_low_rank_project(const OptionalTensor& grad, const at::Tensor& error, const at::Tensor& fixed,
                            const at::Tensor& factor, const OptionalTensor& starts, bool transposed,
                            const OptionalTensor& dropped) {
  check_flat(error, at::kFloat, "the error feedback");
  TORCH_CHECK_VALUE(error.dim() == 3, "the error feedback must be [matrices, rows, columns], but it is ",
                    error.sizes(), ": view it in that shape.");
  TORCH_CHECK_VALUE(
      grad.has_value() == starts.has_value(),
      "a gradient and the table of where its matrices begin need each other: pass both or none.");
  if (grad) {
    check_grad(*grad);
    check_same_device(error, *grad, "the error feedback", "the gradient");
    check_table(*starts, error.size(0), *grad, "the table of starts");
  }
  TORCH_CHECK_VALUE(fixed.dim() == 3, "a factor must be [matrices, length, rank], but it is ", fixed.sizes(),
                    ": view it in that shape.");
  check_rank(fixed.size(2));
  const int64_t known = transposed ? 1 : 2;
  check_factor(fixed, error, error.size(0), error.size(known), fixed.size(2), "the fixed factor");
  check_factor(factor, error, error.size(0), error.size(3 - known), fixed.size(2), "the new factor");
  if (dropped) check_counter(*dropped, 1, error, "the counter of dropped elements");
}

void check_low_rank_decode(const at::Tensor& p, const at::Tensor& q, const at::Tensor& out,
                           const at::Tensor& starts) {
  check_grad(out);
  TORCH_CHECK_VALUE(p.dim() == 3 && q.dim() == 3, "factors must be [matrices, length, rank], but they are ",
                    p.sizes(), " and ", q.sizes(), ": view them in that shape.");
  check_rank(p.size(2));
  check_factor(p, out, p.size(0), p.size(1), p.size(2), "P");
  check_factor(q, out, p.size(0), q.size(1), p.size(2), "Q");
  check_table(starts, p.size(0), out, "the table of starts");
}

void check_gather_segments(const at::Tensor& source, const at::Tensor& table, const at::Tensor& message,
                           const OptionalTensor& dropped) {
  check_scatter_segments(message, table, source);
  if (dropped) check_counter(*dropped, 1, source, "the counter of dropped elements");
}

void check_scatter_segments(const at::Tensor& message, const at::Tensor& table, const at::Tensor& out) {
  check_grad(out);
  check_flat(message, at::kFloat, "the message");
  check_same_device(message, out, "the message", "the gradient");
  TORCH_CHECK_VALUE(table.dim() == 2 && table.size(1) == 3,
                    "the table of segments must be [segments, 3] of start, length and position, but it is ",
                    table.sizes(), ": pass one row for each segment.");
  check_table(table, table.numel(), out, "the table of segments");
}

void check_orthogonalize(const at::Tensor& matrices, const at::Tensor& workspace) {
  check_flat(matrices, at::kFloat, "the matrices");
  TORCH_CHECK_VALUE(matrices.dim() == 3 && matrices.size(2) >= 1 && matrices.size(2) <= matrices.size(1),
                    "orthogonalize needs [batch, rows, columns] with 1 <= columns <= rows, but got ",
                    matrices.sizes(), ": use a rank no larger than the matrix.");
  check_rank(matrices.size(2));
  check_workspace(workspace, at::kDouble,
                  ops::orthogonalize_workspace(matrices.size(0), matrices.size(1), matrices.size(2)),
                  matrices);
}

}  // namespace dear::compress
