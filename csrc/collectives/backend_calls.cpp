#include "collectives/backend_calls.h"

#include <exception>
#include <type_traits>

namespace dear {
namespace {

using Tensors = std::vector<at::Tensor>;

// torch renamed these between 2.11 and 2.13; either name is called where it exists.
template <typename Group, typename = void>
struct HasSingle : std::false_type {};
template <typename Group>
struct HasSingle<Group, std::void_t<decltype(&Group::reduce_scatter_single)>> : std::true_type {};

template <typename Group>
BackendWork reduce_scatter_by_name(Group& group, Tensors& out, Tensors& in,
                                   const c10d::ReduceScatterOptions& options) {
  if constexpr (HasSingle<Group>::value) {
    return in.size() == 1 ? group.reduce_scatter_single(out[0], in[0], options)
                          : group.reduce_scatter_single_coalesced(out, in, options);
  } else {
    return in.size() == 1 ? group._reduce_scatter_base(out[0], in[0], options)
                          : group.reduce_scatter_tensor_coalesced(out, in, options);
  }
}

template <typename Group>
BackendWork all_gather_by_name(Group& group, Tensors& out, Tensors& in) {
  if constexpr (HasSingle<Group>::value) {
    return in.size() == 1 ? group.all_gather_single(out[0], in[0])
                          : group.all_gather_single_coalesced(out, in);
  } else {
    return in.size() == 1 ? group._allgather_base(out[0], in[0])
                          : group.allgather_into_tensor_coalesced(out, in);
  }
}

// One call for each chunk, as one operation where the backend can.
template <typename Call>
std::vector<BackendWork> call_each(c10d::ProcessGroup& group, std::vector<OwnedChunk>& chunks, Call call) {
  std::vector<BackendWork> works;
  const c10::DeviceType device = chunks.front().chunk.device().type();
  const bool together = group.getBackend(device)->supportsCoalescing();
  if (together) group.startCoalescing(device);
  try {
    for (OwnedChunk& each : chunks) {
      Tensors one{each.chunk};
      works.push_back(call(one, each));
    }
  } catch (...) {  // NCCL counts open groups by thread: one left open would take in whatever comes next
    try {
      if (together) group.endCoalescing(device);
    } catch (const std::exception&) {  // the first failure says more
    }
    throw;
  }
  if (together) works = {group.endCoalescing(device)};
  return works;
}

}  // namespace

BackendWork call_reduce_scatter(c10d::ProcessGroup& group, Tensors& out, Tensors& in,
                                c10d::ReduceOp::RedOpType op) {
  c10d::ReduceScatterOptions options;
  options.reduceOp = op;
  return reduce_scatter_by_name(group, out, in, options);
}

BackendWork call_all_gather(c10d::ProcessGroup& group, Tensors& out, Tensors& in) {
  return all_gather_by_name(group, out, in);
}

BackendWork call_all_to_all(c10d::ProcessGroup& group, at::Tensor& out, at::Tensor& in) {
  std::vector<int64_t> equal;
  return group.alltoall_base(out, in, equal, equal);
}

std::vector<BackendWork> call_reduces(c10d::ProcessGroup& group, std::vector<OwnedChunk>& chunks) {
  return call_each(group, chunks, [&](Tensors& one, const OwnedChunk& each) {
    c10d::ReduceOptions options;
    options.reduceOp = each.op;
    options.rootRank = each.owner;
    return group.reduce(one, options);
  });
}

std::vector<BackendWork> call_broadcasts(c10d::ProcessGroup& group, std::vector<OwnedChunk>& chunks) {
  return call_each(group, chunks, [&](Tensors& one, const OwnedChunk& each) {
    c10d::BroadcastOptions options;
    options.rootRank = each.owner;
    return group.broadcast(one, options);
  });
}

}  // namespace dear
