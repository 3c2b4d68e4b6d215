#pragma once

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <vector>

namespace dear {

// What lanes ask of a process group's backend. Nothing waits: works do. Of several tensors in one call, which
// only NCCL takes, all have one type.
using BackendWork = c10::intrusive_ptr<c10d::Work>;

BackendWork call_reduce_scatter(c10d::ProcessGroup& group, std::vector<at::Tensor>& out,
                                std::vector<at::Tensor>& in, c10d::ReduceOp::RedOpType op);
BackendWork call_all_gather(c10d::ProcessGroup& group, std::vector<at::Tensor>& out,
                            std::vector<at::Tensor>& in);
BackendWork call_all_to_all(c10d::ProcessGroup& group, at::Tensor& out, at::Tensor& in);

// What one rank owns of a buffer that every rank has: contiguous, not empty, and as long on every rank.
struct OwnedChunk {
  at::Tensor chunk;
  int owner;
  c10d::ReduceOp::RedOpType op = c10d::ReduceOp::SUM;  // of a reduce
};

// A reduce to each chunk's owner, or a broadcast from it, in the order given, which is that of all ranks. A
// backend that can makes one operation of them, whose work is then the only one. A reduce leaves the sum in
// the owner's chunk, and in those of the others what may be partial sums.
std::vector<BackendWork> call_reduces(c10d::ProcessGroup& group, std::vector<OwnedChunk>& chunks);
std::vector<BackendWork> call_broadcasts(c10d::ProcessGroup& group, std::vector<OwnedChunk>& chunks);

}  // namespace dear
