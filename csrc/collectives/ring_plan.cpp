#include "collectives/ring_plan.h"

#include <algorithm>

namespace dear {
namespace {

constexpr int64_t kLargestPiece = 256 << 10;
constexpr int64_t kSmallestPiece = 16 << 10;
constexpr int64_t kPiecesPerChunk = 4;  // enough that a rank forwards while it still receives

int wrap(int rank, int world) { return ((rank % world) + world) % world; }

// Appends the pieces of chunk `chunk` of every part.
void append_chunk(const Exchange& exchange, int chunk, int rank, int world, std::vector<Piece>* pieces) {
  int64_t chunk_bytes = 0;
  for (const Part& part : exchange.parts()) {
    chunk_bytes += Shards{part.full.numel(), world}.size(chunk) * part.full.element_size();
  }
  const int64_t piece_bytes = std::clamp(chunk_bytes / kPiecesPerChunk, kSmallestPiece, kLargestPiece);
  const bool gather = exchange.phase() == Phase::kAllGather;
  for (const Part& part : exchange.parts()) {
    const Shards shards{part.full.numel(), world};
    const int64_t size = part.full.element_size();
    const int64_t step = std::max<int64_t>(1, piece_bytes / size);
    auto* full = static_cast<char*>(part.full.data_ptr());
    char* shard = gather ? nullptr : static_cast<char*>(part.shard.data_ptr());
    for (int64_t at = shards.begin(chunk); at < shards.end(chunk); at += step) {
      const int64_t count = std::min(step, shards.end(chunk) - at);
      char* out =
          gather ? full + at * size : (chunk == rank ? shard + (at - shards.begin(rank)) * size : nullptr);
      pieces->push_back({full + at * size, out, count, count * size, part.full.scalar_type()});
    }
  }
}

uint32_t mix(uint32_t hash, uint64_t value) {  // FNV-1a over eight bytes
  for (int shift = 0; shift < 64; shift += 8)
    hash = (hash ^ static_cast<uint8_t>(value >> shift)) * 16777619u;
  return hash;
}

}  // namespace

RingPlan make_ring_plan(const Exchange& exchange, int rank, int world) {
  RingPlan plan;
  const int lead = exchange.phase() == Phase::kReduceScatter ? 1 : 0;  // see the table at RingPlan
  for (int step = 0; step + 1 < world; ++step) {
    const size_t before = plan.inbound.size();
    append_chunk(exchange, wrap(rank - lead - step, world), rank, world, &plan.outbound);
    append_chunk(exchange, wrap(rank - lead - step - 1, world), rank, world, &plan.inbound);
    if (step == 0) plan.first_chunk = plan.outbound.size();
    plan.last_chunk = plan.inbound.size() - before;
    plan.largest_chunk = std::max(plan.largest_chunk, plan.last_chunk);
  }
  for (const Piece& piece : plan.inbound) plan.largest_piece = std::max(plan.largest_piece, piece.bytes);

  uint32_t hash = 2166136261u;
  hash = mix(hash, exchange.phase() == Phase::kReduceScatter ? 1 : 2);
  hash = mix(hash, exchange.reduction() == Reduction::kSum ? 1 : 2);
  for (const Part& part : exchange.parts()) {
    hash = mix(mix(hash, static_cast<uint64_t>(part.full.numel())),
               static_cast<uint64_t>(part.full.scalar_type()));
  }
  plan.signature = hash;
  return plan;
}

}  // namespace dear
