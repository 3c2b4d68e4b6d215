#include "compress/codecs/topk.h"

#include "compress/ops/topk.h"

namespace dear::compress {
namespace {

// A sample is one run of this many elements out of every stretch of some such runs.
constexpr int64_t kRun = 64;

// A threshold is kept while it selects k of the sample to within this share of it.
constexpr double kTolerance = 0.04;

}  // namespace

Selection::Selection(at::Device device, int64_t numel, int64_t k, int64_t stretch)
    : k_(k), stretch_(stretch) {
  const auto options = at::TensorOptions().device(device);
  const at::Tensor counters = at::zeros({3}, options.dtype(at::kInt));
  ties_ = counters.narrow(0, 0, 1);
  stats_ = counters.narrow(0, 1, 2);
  selected_ = counters.narrow(0, 1, 1);
  dropped_ = counters.narrow(0, 2, 1);
  threshold_ = at::zeros({1}, options.dtype(at::kFloat));
  workspace_ = at::zeros({topk_workspace_numel(numel)}, options.dtype(at::kInt));
}

void Selection::exact(const std::optional<at::Tensor>& grad, const at::Tensor& error, int64_t shard,
                      const at::Tensor& slots) {
  stats_.zero_();
  ops::topk_threshold(grad, error, k_, threshold_, ties_, workspace_);
  ops::topk_select(grad, error, threshold_, ties_, shard, slots, stats_, workspace_);
}

void Selection::by_threshold(int64_t step, const at::Tensor& grad, const at::Tensor& error, int64_t shard,
                             const at::Tensor& slots) {
  stats_.zero_();
  const at::Tensor grads = sample(grad, step, grad_sample_);
  const at::Tensor errors = sample(error, step, error_sample_);
  const int64_t k = std::max<int64_t>(1, (k_ * grads.numel() + error.numel() / 2) / error.numel());
  ops::topk_refresh(grads, errors, k, threshold_, ties_, workspace_, kTolerance);
  // Where most elements are zero, they are not to fill the slots.
  threshold_.clamp_min_(std::numeric_limits<float>::min());
  ops::topk_select(grad, error, threshold_, std::nullopt, shard, slots, stats_, workspace_);
}

at::Tensor Selection::sample(const at::Tensor& values, int64_t step, at::Tensor& kept) const {
  const int64_t length = stretch_ * kRun;
  const int64_t stretches = values.numel() / length;
  const int64_t begin = step % stretch_ * kRun;
  if (!kept.defined()) kept = at::empty({stretches, kRun}, values.options());
  kept.copy_(values.narrow(0, 0, stretches * length).view({stretches, length}).narrow(1, begin, kRun));
  return kept.view(-1);
}

TopKCodec::TopKCodec(at::Device device, int64_t rank, int64_t world, int64_t numel, int64_t shard,
                     int64_t owned, int64_t k, int64_t owner_k, int64_t capacity, int64_t stretch,
                     std::optional<at::Tensor> error, std::optional<at::Tensor> owner_error)
    : OwnerCodec(device, rank, world, slot_words(capacity)),
      world_(world),
      shard_(shard),
      owned_(owned),
      exact_(stretch == 0),
      feedback_(error.has_value()),
      own_(device, numel, k, stretch) {
  if (error) error_ = *error;
  if (owner_error) total_ = *owner_error;
  slots_ = int_buffer({world, slot_words(capacity)});
  slot_ = int_buffer({1, slot_words(capacity)});
  if (owned > 0) merged_.emplace(device, owned, std::min(owner_k, owned), /*stretch=*/0);
}

// Of a codec that only reads, neither buffer is ever made.
void TopKCodec::clear(at::Tensor& buffer, int64_t numel) const {
  if (!buffer.defined()) buffer = at::empty({numel}, slots_.options().dtype(at::kFloat));
  buffer.zero_();
}

void TopKCodec::encode(int64_t step, const at::Tensor& rows) {
  if (!feedback_) clear(error_, gradient_.numel());
  if (exact_) {
    own_.exact(gradient_, error_, shard_, slots_);
  } else {
    own_.by_threshold(step, gradient_, error_, shard_, slots_);
  }
  dropped_.copy_(own_.dropped());
  rows.copy_(slots_);
}

void TopKCodec::merge(int64_t, const at::Tensor& rows, const at::Tensor& merged) {
  if (!merged_) return;
  if (!feedback_) clear(total_, owned_);
  slots_.copy_(rows);
  ops::topk_accumulate(slots_, total_, 1.0 / static_cast<double>(world_), dropped_);
  merged_->exact(std::nullopt, total_, owned_, slot_);
  merged.copy_(slot_.view(-1));
}

void TopKCodec::decode(int64_t, const at::Tensor& rows) {
  slots_.copy_(rows);
  ops::topk_decode(slots_, result_, shard_, 1.0);
}

}  // namespace dear::compress
