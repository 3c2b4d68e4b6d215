#include "collectives/ring_pieces.h"

#include <algorithm>

namespace dear {
namespace {

constexpr int64_t kLargestPiece = 256 << 10;
constexpr int64_t kSmallestPiece = 16 << 10;
constexpr int64_t kPiecesPerChunk = 4;  // enough that a rank forwards while it still receives
constexpr size_t kBlockPieces = 4;      // 1 MiB at most: two blocks in flight stay in the cache

char nothing[1];  // what an empty piece stands at

int wrap(int rank, int world) { return ((rank % world) + world) % world; }

// The pieces of chunk `chunk` of every part.
std::vector<Piece> cut_chunk(const Exchange& exchange, int chunk, int rank, int world) {
  std::vector<Piece> pieces;
  int64_t chunk_bytes = 0;
  for (const Part& part : exchange.parts()) {
    chunk_bytes += owners_of(part, world)->size(chunk) * part.full.element_size();
  }
  const int64_t piece_bytes = std::clamp(chunk_bytes / kPiecesPerChunk, kSmallestPiece, kLargestPiece);
  const bool gather = exchange.phase() == Phase::kAllGather;
  for (const Part& part : exchange.parts()) {
    const auto owners = owners_of(part, world);
    const int64_t size = part.full.element_size();
    const int64_t step = std::max<int64_t>(1, piece_bytes / size);
    auto* full = static_cast<char*>(part.full.data_ptr());
    char* shard = gather ? nullptr : static_cast<char*>(part.shard.data_ptr());
    for (const Range& range : owners->ranges(chunk)) {
      for (int64_t at = range.begin; at < range.end; at += step) {
        const int64_t count = std::min(step, range.end - at);
        char* out = nullptr;
        if (gather) {
          out = full + at * size;
        } else if (chunk == rank) {
          out = shard + (range.at + at - range.begin) * size;
        }
        pieces.push_back({full + at * size, out, count, count * size, part.full.scalar_type()});
      }
    }
  }
  return pieces;
}

}  // namespace

RingPieces make_ring_pieces(const Exchange& exchange, int rank, int world) {
  RingPieces pieces;
  std::vector<std::vector<Piece>> chunks;
  size_t longest = 0;
  for (int chunk = 0; chunk < world; ++chunk) {
    chunks.push_back(cut_chunk(exchange, chunk, rank, world));
    longest = std::max(longest, chunks.back().size());
    for (const Piece& piece : chunks.back())
      pieces.largest_piece = std::max(pieces.largest_piece, piece.bytes);
  }

  // See Note [Empty pieces].
  const bool moves = std::any_of(chunks.begin(), chunks.end(), [](const auto& cut) { return !cut.empty(); });
  for (int chunk = 0; chunk < world && world > 2 && moves; ++chunk) {
    if (!chunks[chunk].empty()) continue;
    const bool ends = exchange.phase() == Phase::kAllGather || chunk == rank;
    chunks[chunk].push_back({nothing, ends ? nothing : nullptr, 0, 0, at::kByte});
  }

  // Note [Enough slots]
  // Partial sums wait in slots until they are sent on, first in, first out: as many as two blocks have
  // pieces, and two more. Were all slots of all ranks full, each rank would have received more than it has
  // sent, and yet no rank can have received what its neighbour has not sent; so the ring never locks.
  const bool reduces = exchange.phase() == Phase::kReduceScatter;
  pieces.slots = 2 * kBlockPieces + 2;
  size_t partial_sums = 0;
  const int lead = reduces ? 1 : 0;  // see the table at RingPieces
  for (size_t pair = 0; pair < longest; pair += 2 * kBlockPieces) {
    size_t received[2] = {0, 0};  // where each block of the step before begins in `inbound`
    for (int step = 0; step + 1 < world; ++step) {
      const std::vector<Piece>& sent = chunks[wrap(rank - lead - step, world)];
      const std::vector<Piece>& taken = chunks[wrap(rank - lead - step - 1, world)];
      for (size_t block = 0; block < 2; ++block) {
        const size_t first = pair + block * kBlockPieces;
        for (size_t i = first; i < std::min(first + kBlockPieces, sent.size()); ++i) {
          pieces.outbound.push_back(sent[i]);
          if (step > 0) pieces.outbound.back().source = static_cast<int64_t>(received[block] + i - first);
        }
        received[block] = pieces.inbound.size();
        for (size_t i = first; i < std::min(first + kBlockPieces, taken.size()); ++i) {
          pieces.inbound.push_back(taken[i]);
          pieces.inbound.back().summed = step > 0;
          pieces.inbound.back().slot = taken[i].out == nullptr ? partial_sums++ % pieces.slots : pieces.slots;
        }
      }
    }
  }

  pieces.signature = exchange.signature();
  return pieces;
}

}  // namespace dear
