// Collectives, for Python.
#include <pybind11/chrono.h>

#include "bindings.h"
#include "collectives/checksum.h"
#include "collectives/mesh.h"
#include "collectives/native.h"
#include "collectives/ring.h"
#include "collectives/shard.h"
#include "collectives/two_level.h"

namespace dear::bindings {

namespace {

void bind_ownership(py::module_& m) {
  using Bounds = std::vector<std::vector<std::pair<int64_t, int64_t>>>;
  py::class_<Ownership, std::shared_ptr<Ownership>>(m, "Ownership")
      .def(py::init([](int64_t numel, const Bounds& by_rank) {
             std::vector<std::vector<Range>> ranges;
             for (const auto& bounds : by_rank) {
               ranges.emplace_back();
               for (const auto& [begin, end] : bounds) ranges.back().push_back({begin, end});
             }
             return std::make_shared<Ownership>(numel, std::move(ranges));
           }),
           py::arg("numel"), py::arg("ranges"))
      .def_static(
          "even",
          [](int64_t numel, int world) {
            return std::const_pointer_cast<Ownership>(Ownership::even(numel, world));
          },
          py::arg("numel"), py::arg("world"))
      .def_property_readonly("numel", &Ownership::numel)
      .def_property_readonly("world", &Ownership::world)
      .def("size", &Ownership::size, py::arg("rank"))
      .def(
          "ranges",
          [](const Ownership& self, int rank) {
            std::vector<std::pair<int64_t, int64_t>> bounds;
            for (const Range& range : self.ranges(rank)) bounds.emplace_back(range.begin, range.end);
            return bounds;
          },
          py::arg("rank"));
}

void bind_exchange(py::module_& m) {
  py::enum_<Phase>(m, "Phase")
      .value("reduce_scatter", Phase::kReduceScatter)
      .value("all_gather", Phase::kAllGather)
      .value("all_to_all", Phase::kAllToAll);
  py::enum_<Reduction>(m, "Reduction").value("sum", Reduction::kSum).value("average", Reduction::kAverage);

  py::class_<Exchange, std::shared_ptr<Exchange>>(m, "Exchange")
      .def("wait", &Exchange::wait, NoGil())
      .def("done", &Exchange::done)
      .def("bytes_sent", &Exchange::bytes_sent)
      .def_property_readonly("start_ns", &Exchange::start_ns)
      .def_property_readonly("end_ns", &Exchange::end_ns)
      .def_property_readonly("label", &Exchange::label);
}

void bind_lane(py::module_& m) {
  py::class_<Lane, std::shared_ptr<Lane>>(m, "Lane")
      .def(
          "submit",
          [](Lane& lane, Phase phase, Reduction reduction,
             const std::vector<std::pair<at::Tensor, at::Tensor>>& pairs, std::string label,
             const std::vector<std::shared_ptr<Ownership>>& owners) {
            TORCH_CHECK_VALUE(owners.empty() || owners.size() == pairs.size(),
                              "owners must be one for each of parts, or left out.");
            std::vector<Part> parts;
            for (const auto& [full, shard] : pairs) {
              parts.push_back({full, shard, owners.empty() ? nullptr : owners[parts.size()]});
            }
            auto exchange = lane.make_exchange(phase, reduction, std::move(parts), std::move(label));
            lane.submit(exchange);
            return exchange;
          },
          py::arg("phase"), py::arg("reduction"), py::arg("parts"), py::arg("label"),
          py::arg("owners") = std::vector<std::shared_ptr<Ownership>>{}, NoGil())
      .def("abort", &Lane::abort, NoGil())
      .def(
          "investigate",
          [](Lane& lane, const std::string& phase, const std::string& label,
             std::chrono::milliseconds patience) -> std::optional<std::string> {
            const py::gil_scoped_release release;
            const auto found = lane.investigate(phase, label, patience);
            return found ? std::optional<std::string>(found->what()) : std::nullopt;
          },
          py::arg("phase"), py::arg("label"), py::arg("patience"))
      .def_property_readonly("rank", &Lane::rank)
      .def_property_readonly("world", &Lane::world);
}

void bind_peers(py::module_& m) {
  py::class_<Peers, std::shared_ptr<Peers>>(m, "Peers")
      .def(py::init([](int rank, int world, std::string address, bool checksum, const py::bytes& key,
                       std::string recorder) {
             return std::make_shared<Peers>(rank, world, std::move(address), checksum, std::string(key),
                                            std::move(recorder));
           }),
           py::arg("rank"), py::arg("world"), py::arg("address"), py::kw_only(), py::arg("checksum") = true,
           py::arg("key") = py::bytes(), py::arg("recorder") = "")
      .def_property_readonly("failed", &Peers::failed)
      .def_property_readonly("rank", &Peers::rank)
      .def_property_readonly("world", &Peers::world);
}

// A lane over connections of its own.
template <typename HostLane>
void bind_host_lane(py::module_& m, const char* name) {
  py::class_<HostLane, Lane, std::shared_ptr<HostLane>>(m, name).def(
      py::init([](std::shared_ptr<Peers> peers, const c10::intrusive_ptr<c10d::Store>& store,
                  const std::string& key, std::chrono::milliseconds timeout, std::vector<int> ranks) {
        const py::gil_scoped_release release;
        return make_shared_without_gil<HostLane>(std::move(peers), store, key, timeout, std::move(ranks));
      }),
      py::arg("peers"), py::arg("store"), py::arg("key"), py::arg("timeout"),
      py::arg("ranks") = std::vector<int>{});
}

void bind_lanes(py::module_& m) {
  bind_host_lane<RingLane>(m, "RingLane");
  bind_host_lane<MeshLane>(m, "MeshLane");
  py::class_<NativeLane, Lane, std::shared_ptr<NativeLane>>(m, "NativeLane")
      .def(py::init([](c10::intrusive_ptr<c10d::ProcessGroup> group) {
             // The lane may hold the group's last reference, and the backend's threads tensors of Python's.
             return make_shared_without_gil<NativeLane>(std::move(group));
           }),
           py::arg("group"));
  py::class_<TwoLevelLane, Lane, std::shared_ptr<TwoLevelLane>>(m, "TwoLevelLane")
      .def(py::init([](std::shared_ptr<Lane> inside, std::shared_ptr<Lane> between, Nodes nodes) {
             return make_shared_without_gil<TwoLevelLane>(std::move(inside), std::move(between),
                                                          std::move(nodes));
           }),
           py::arg("inside"), py::arg("between"), py::arg("nodes"))
      .def_property_readonly("bytes_inside", &TwoLevelLane::bytes_inside)
      .def_property_readonly("bytes_between", &TwoLevelLane::bytes_between);
}

void bind_functions(py::module_& m) {
  m.def(
      "checksum",
      [](const py::bytes& data, uint32_t seed) {
        const std::string_view view = data;
        return checksum(view.data(), view.size(), seed);
      },
      py::arg("data"), py::arg("seed") = 0);
  m.def(
      "checksum_each_way",
      [](const py::bytes& data, uint32_t seed) {
        const std::string_view view = data;
        return checksum_each_way(view.data(), view.size(), seed);
      },
      py::arg("data"), py::arg("seed") = 0);
  m.def("shard_range", [](int64_t numel, int world, int rank) {
    const Shards shards{numel, world};
    return std::make_pair(shards.begin(rank), shards.end(rank));
  });
}

}  // namespace

void bind_collectives(py::module_& m) {
  bind_exchange(m);
  bind_ownership(m);
  bind_lane(m);
  bind_peers(m);
  bind_lanes(m);
  bind_functions(m);
}

}  // namespace dear::bindings
