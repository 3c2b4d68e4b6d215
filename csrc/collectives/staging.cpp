#include "collectives/staging.h"

#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>

namespace dear {
namespace {

// The number of elements, up to a multiple of 16 bytes.
int64_t aligned(int64_t numel, const at::TensorOptions& options) {
  const int64_t step = std::max<int64_t>(1, 16 / static_cast<int64_t>(options.dtype().itemsize()));
  return (numel + step - 1) / step * step;
}

}  // namespace

double padding_share(const std::vector<Part>& parts, int world) {
  std::map<at::ScalarType, std::vector<int64_t>> by_type;  // elements by rank
  for (const Part& part : parts) {
    if (!is_uneven(part)) continue;
    auto& sizes = by_type[part.full.scalar_type()];
    sizes.resize(static_cast<size_t>(world));
    for (int rank = 0; rank < world; ++rank) sizes[static_cast<size_t>(rank)] += part.owners->size(rank);
  }
  int64_t owned = 0;
  int64_t padded = 0;
  for (const auto& [type, sizes] : by_type) {
    const auto bytes = static_cast<int64_t>(c10::elementSize(type));
    owned += bytes * std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
    padded += bytes * world * *std::max_element(sizes.begin(), sizes.end());
  }
  return owned == 0 ? 0.0 : static_cast<double>(padded - owned) / static_cast<double>(owned);
}

Staging::Staging(std::vector<Part> parts, Phase phase, int rank, int world, int64_t below, Chunks layout) {
  // By type, so that the order is equal on all ranks.
  std::map<at::ScalarType, std::vector<std::vector<Staged>>> staged;
  for (size_t i = 0; i < parts.size(); ++i) {
    const Part& part = parts[i];
    if (!is_uneven(part)) {
      moved_.push_back(part);
      continue;
    }
    const auto is_short = [&](const Range& range) {
      return range.size() * static_cast<int64_t>(part.full.element_size()) < below;
    };
    auto& by_rank = staged[part.full.scalar_type()];
    by_rank.resize(static_cast<size_t>(world));
    for (int owner = 0; owner < world; ++owner) {
      for (const Range& range : part.owners->ranges(owner)) {
        if (is_short(range)) by_rank[static_cast<size_t>(owner)].push_back({i, range});
      }
    }
    Part rest{part.full, part.shard, part.owners->without(is_short)};
    if (rest.owners->owned() > 0) moved_.push_back(std::move(rest));
  }
  for (const auto& [type, by_rank] : staged) stage(parts, by_rank, phase, rank, layout);
}

void Staging::stage(const std::vector<Part>& parts, const std::vector<std::vector<Staged>>& by_rank,
                    Phase phase, int rank, Chunks layout) {
  std::vector<int64_t> sizes;
  for (const auto& ranges : by_rank) {
    int64_t size = 0;
    for (const Staged& each : ranges) size += each.range.size();
    sizes.push_back(size);
  }
  const int64_t longest = *std::max_element(sizes.begin(), sizes.end());
  if (longest == 0) return;
  const auto first = std::find_if(by_rank.begin(), by_rank.end(), [](const auto& r) { return !r.empty(); });
  const at::TensorOptions options = parts[first->front().part].full.options();
  std::vector<std::vector<Range>> chunks;
  int64_t end = 0;
  for (const int64_t size : sizes) {
    chunks.emplace_back();
    const int64_t length = layout == Chunks::kPadded ? longest : size;
    if (length > 0) chunks.back().push_back({end, end + length});
    end += layout == Chunks::kAligned ? aligned(length, options) : length;
  }
  const at::Tensor buffer = at::zeros({end}, options);
  for (size_t owner = 0; owner < by_rank.size(); ++owner) {
    const bool own = static_cast<int>(owner) == rank;
    int64_t at = chunks[owner].empty() ? 0 : chunks[owner].front().begin;
    for (const Staged& each : by_rank[owner]) {
      const Part& part = parts[each.part];
      const at::Tensor inside = buffer.narrow(0, at, each.range.size());
      const at::Tensor outside = part.full.narrow(0, each.range.begin, each.range.size());
      at += each.range.size();
      if (phase == Phase::kReduceScatter || own) {
        in_.from.push_back(outside);
        in_.to.push_back(inside);
      }
      if (phase == Phase::kReduceScatter && own) {
        out_.from.push_back(inside);
        out_.to.push_back(part.shard.narrow(0, each.range.at, each.range.size()));
      }
      if (phase == Phase::kAllGather && !own) {
        out_.from.push_back(inside);
        out_.to.push_back(outside);
      }
    }
  }
  const auto& mine = chunks[static_cast<size_t>(rank)];
  const at::Tensor shard =
      mine.empty() ? buffer.narrow(0, 0, 0) : buffer.narrow(0, mine.front().begin, mine.front().size());
  const bool equal = layout == Chunks::kPadded;
  moved_.push_back(
      {buffer, shard, equal ? nullptr : std::make_shared<const Ownership>(end, std::move(chunks))});
}

void Staging::copy(Copies& copies) {
  if (copies.from.empty()) return;
  if (!copies.from.front().is_cpu()) {
    at::_foreach_copy_(copies.to, copies.from);
    return;
  }
  for (size_t i = 0; i < copies.from.size(); ++i)
    std::memcpy(copies.to[i].mutable_data_ptr(), copies.from[i].const_data_ptr(), copies.from[i].nbytes());
}

}  // namespace dear
