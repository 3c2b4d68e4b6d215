#include "compress/codecs/two_level.h"

#include <algorithm>
#include <limits>

#include "compress/layout.h"
#include "compress/ops/finite.h"

namespace dear::compress {

namespace {

// Outcomes begin at multiples of this many words, since kernels read them in vectors of 16 bytes.
constexpr int64_t kOutcomeWords = 4;

bool is_one_run(const std::vector<Range>& ranges) {
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].begin != ranges[i - 1].end) return false;
  }
  return true;
}

}  // namespace

TwoLevelCodec::TwoLevelCodec(at::Device device, std::shared_ptr<Codec> inner,
                             std::shared_ptr<const Ownership> owners, int64_t place,
                             std::vector<std::shared_ptr<Codec>> readers, int64_t between)
    : Codec(device),
      inner_(std::move(inner)),
      owners_(std::move(owners)),
      place_(static_cast<size_t>(place)),
      readers_(std::move(readers)),
      between_(static_cast<size_t>(between)) {
  TORCH_CHECK_VALUE(readers_.empty() || readers_.size() == static_cast<size_t>(owners_->world()),
                    "readers must be one for each of ", owners_->world(), " places, or none.");
  std::vector<int64_t> first;
  for (int each = 0; each < owners_->world(); ++each) {
    if (owners_->size(each) > 0) first.push_back(owners_->ranges(each).front().begin);
  }
  first_ = at::tensor(first, at::kLong).to(device);
  lost_ = at::zeros_like(dropped_);
}

void TwoLevelCodec::bind(at::Tensor gradient, at::Tensor result) {
  Codec::bind(std::move(gradient), std::move(result));
  if (!mean_.defined()) {
    mean_ = at::empty({owners_->size(static_cast<int>(place_))}, gradient_.options());
  }
  values_.resize(static_cast<size_t>(owners_->world()));
  for (size_t place = 0; place < values_.size(); ++place) {
    if (place != place_ && (readers_.empty() || !readers_[place])) continue;
    values_[place] = room_for(place);
    if (place == place_) {
      inner_->bind(mean_, values_[place]);
    } else {
      readers_[place]->bind(values_[place], values_[place]);
    }
  }
}

at::Tensor TwoLevelCodec::room_for(size_t place) {
  const auto& ranges = owners_->ranges(static_cast<int>(place));
  const int64_t size = owners_->size(static_cast<int>(place));
  if (size > 0 && is_one_run(ranges)) return result_.narrow(0, ranges.front().begin, size);
  const at::Tensor& before = values_[place];
  const bool keeps = before.defined() && before.numel() == size && !before.is_alias_of(result_);
  return keeps ? before : at::empty({size}, result_.options());
}

// The results of a place to where they belong.
void TwoLevelCodec::put(size_t place) {
  const auto& ranges = owners_->ranges(static_cast<int>(place));
  if (is_one_run(ranges)) return;
  for (const Range& range : ranges) {
    result_.narrow(0, range.begin, range.size()).copy_(values_[place].narrow(0, range.at, range.size()));
  }
}

// The other way round.
void TwoLevelCodec::take(size_t place) {
  const auto& ranges = owners_->ranges(static_cast<int>(place));
  if (is_one_run(ranges)) return;
  for (const Range& range : ranges) {
    values_[place].narrow(0, range.at, range.size()).copy_(result_.narrow(0, range.begin, range.size()));
  }
}

std::optional<Message> TwoLevelCodec::advance(int64_t step, size_t stage) {
  if (stage == 0) {
    TORCH_CHECK(inner_->stages(step) <= between_, "A compressor makes ", inner_->stages(step),
                " exchanges, and announced ", between_, " at most.");
    ops::count_nonfinite(gradient_, dropped_);
    return Message{Phase::kReduceScatter, gradient_, mean_, owners_};
  }
  if (stage <= inner_->stages(step)) return inner_->advance(step, stage - 1);
  if (stage <= between_) return Message{Phase::kAllGather, result_.narrow(0, 0, 0), {}};
  if (stage == between_ + 1) {
    reads_ = !outcomes(step).empty();
    return reads_ ? gather_outcomes(step) : gather_results(step);
  }
  if (reads_) {
    read_outcomes(step);
  } else {
    nonfinite_ = result_.index_select(0, first_).isfinite().logical_not_();
    show_results(step);
  }
  return std::nullopt;
}

bool TwoLevelCodec::compresses(int64_t step) const {
  return inner_->compresses(step) ||
         std::any_of(readers_.begin(), readers_.end(),
                     [step](const auto& reader) { return reader && reader->compresses(step); });
}

// To readers that follow a dense step.
void TwoLevelCodec::show_results(int64_t step) {
  for (size_t place = 0; place < readers_.size(); ++place) {
    if (place == place_ || !readers_[place] || readers_[place]->compresses(step)) continue;
    take(place);
    readers_[place]->read(step, {});
  }
}

// The buffers of the places' outcomes, undefined for one that owns nothing; none at all where results are
// gathered, which all ranks of the node see alike.
std::vector<at::Tensor> TwoLevelCodec::outcomes(int64_t step) const {
  std::vector<at::Tensor> found(readers_.size());
  for (size_t place = 0; place < readers_.size(); ++place) {
    if (owners_->size(static_cast<int>(place)) == 0) continue;
    if (place != place_ && !readers_[place]) return {};
    found[place] = (place == place_ ? inner_ : readers_[place])->outcome(step);
    if (!found[place].defined()) return {};
  }
  return found;
}

// Without a look at the device, on a GPU.
Message TwoLevelCodec::gather_results(int64_t step) {
  inner_->advance(step, inner_->stages(step));
  if (mean_.numel() > 0) {
    at::Tensor lost = inner_->nonfinite();
    if (!lost.defined()) {
      ops::count_nonfinite(values_[place_], lost_);
      lost = lost_;
    }
    values_[place_].narrow(0, 0, 1).masked_fill_(lost.ne(0).any(), std::numeric_limits<double>::quiet_NaN());
    put(place_);
  }
  return Message{Phase::kAllGather, result_, {}, owners_};
}

Message TwoLevelCodec::gather_outcomes(int64_t step) {
  const std::vector<at::Tensor> own = outcomes(step);
  std::vector<std::vector<Range>> ranges(own.size());
  int64_t words = 0;
  bool same = parts_ != nullptr;
  for (size_t place = 0; place < own.size(); ++place) {
    const int64_t size = own[place].defined() ? own[place].numel() : 0;
    if (size > 0) ranges[place] = {{words, words + size}};
    same = same && parts_->size(static_cast<int>(place)) == size;
    words += ceil_div(size, kOutcomeWords) * kOutcomeWords;
  }
  if (!same) {
    node_ = at::zeros({words}, dropped_.options());
    parts_ = std::make_shared<Ownership>(words, std::move(ranges));
  }
  if (mean_.numel() > 0) {
    const Range mine = parts_->ranges(static_cast<int>(place_)).front();
    node_.narrow(0, mine.begin, mine.size()).copy_(own[place_]);
  }
  return Message{Phase::kAllGather, node_, {}, parts_};
}

void TwoLevelCodec::read_outcomes(int64_t step) {
  std::vector<at::Tensor> lost;
  for (size_t place = 0; place < readers_.size(); ++place) {
    if (owners_->size(static_cast<int>(place)) == 0) continue;
    if (place == place_) {
      inner_->advance(step, inner_->stages(step));
      lost.push_back(inner_->nonfinite());
    } else {
      const Range part = parts_->ranges(static_cast<int>(place)).front();
      readers_[place]->read(step, node_.narrow(0, part.begin, part.size()));
      lost.push_back(readers_[place]->nonfinite());
    }
    put(place);
  }
  nonfinite_ = at::cat(lost).ne_(0);
}

}  // namespace dear::compress
