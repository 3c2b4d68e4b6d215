#include "collectives/staging.h"

#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <map>

namespace dear {

Staging::Staging(std::vector<Part> parts, Phase phase, int rank, int world, int64_t below, bool pad) {
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
  for (const auto& [type, by_rank] : staged) stage(parts, by_rank, phase, rank, pad);
}

void Staging::stage(const std::vector<Part>& parts, const std::vector<std::vector<Staged>>& by_rank,
                    Phase phase, int rank, bool pad) {
  std::vector<int64_t> sizes;
  for (const auto& ranges : by_rank) {
    int64_t size = 0;
    for (const Staged& each : ranges) size += each.range.size();
    sizes.push_back(size);
  }
  const int64_t longest = *std::max_element(sizes.begin(), sizes.end());
  if (longest == 0) return;
  std::vector<std::vector<Range>> chunks;
  int64_t end = 0;
  for (const int64_t size : sizes) {
    chunks.emplace_back();
    const int64_t length = pad ? longest : size;
    if (length > 0) chunks.back().push_back({end, end + length});
    end += length;
  }
  const auto first = std::find_if(by_rank.begin(), by_rank.end(), [](const auto& r) { return !r.empty(); });
  const at::Tensor buffer = at::zeros({end}, parts[first->front().part].full.options());
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
  moved_.push_back(
      {buffer, shard, pad ? nullptr : std::make_shared<const Ownership>(end, std::move(chunks))});
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
