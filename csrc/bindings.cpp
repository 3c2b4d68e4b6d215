// Collectives, for Python, and the module.
#include "bindings.h"

#include <pybind11/chrono.h>

#include "collectives/mesh.h"
#include "collectives/native.h"
#include "collectives/ring.h"

namespace {

namespace py = pybind11;

using dear::Exchange;
using dear::Lane;
using dear::Part;
using dear::Phase;
using dear::Reduction;
using dear::bindings::make_shared_without_gil;
using dear::bindings::NoGil;

// A lane over connections of its own.
template <typename HostLane>
void bind_host_lane(py::module_& m, const char* name) {
  py::class_<HostLane, Lane, std::shared_ptr<HostLane>>(m, name).def(
      py::init([](const c10::intrusive_ptr<c10d::Store>& store, const std::string& key, int rank, int world,
                  std::chrono::milliseconds timeout) {
        const py::gil_scoped_release release;
        return make_shared_without_gil<HostLane>(store, key, rank, world, timeout);
      }),
      py::arg("store"), py::arg("key"), py::arg("rank"), py::arg("world"), py::arg("timeout"));
}

void bind_collectives(py::module_& m) {
  py::enum_<Phase>(m, "Phase")
      .value("reduce_scatter", Phase::kReduceScatter)
      .value("all_gather", Phase::kAllGather)
      .value("all_to_all", Phase::kAllToAll);
  py::enum_<Reduction>(m, "Reduction").value("sum", Reduction::kSum).value("average", Reduction::kAverage);

  py::class_<Exchange, std::shared_ptr<Exchange>>(m, "Exchange")
      .def("wait", &Exchange::wait, NoGil())
      .def("done", &Exchange::done)
      .def_property_readonly("start_ns", &Exchange::start_ns)
      .def_property_readonly("end_ns", &Exchange::end_ns)
      .def_property_readonly("label", &Exchange::label);

  py::class_<Lane, std::shared_ptr<Lane>>(m, "Lane")
      .def(
          "submit",
          [](Lane& lane, Phase phase, Reduction reduction,
             const std::vector<std::pair<at::Tensor, at::Tensor>>& pairs, std::string label) {
            std::vector<Part> parts;
            for (const auto& [full, shard] : pairs) parts.push_back({full, shard});
            auto exchange = lane.make_exchange(phase, reduction, std::move(parts), std::move(label));
            lane.submit(exchange);
            return exchange;
          },
          py::arg("phase"), py::arg("reduction"), py::arg("parts"), py::arg("label"), NoGil())
      .def("abort", &Lane::abort, NoGil())
      .def_property_readonly("rank", &Lane::rank)
      .def_property_readonly("world", &Lane::world);

  bind_host_lane<dear::RingLane>(m, "RingLane");
  bind_host_lane<dear::MeshLane>(m, "MeshLane");
  py::class_<dear::NativeLane, Lane, std::shared_ptr<dear::NativeLane>>(m, "NativeLane")
      .def(py::init([](c10::intrusive_ptr<c10d::ProcessGroup> group) {
             // The lane may hold the group's last reference, and the backend's threads tensors of Python's.
             return make_shared_without_gil<dear::NativeLane>(std::move(group));
           }),
           py::arg("group"));

  m.def("now_ns", &dear::now_ns);
  m.def("shard_range", [](int64_t numel, int world, int rank) {
    const dear::Shards shards{numel, world};
    return std::make_pair(shards.begin(rank), shards.end(rank));
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The native part: collectives, schedule and compressors.";
  bind_collectives(m);
  dear::bindings::bind_compress(m);
  dear::bindings::bind_schedule(m);
}
