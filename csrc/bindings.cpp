// The only file that knows both Python and C++.
#include <torch/csrc/utils/pybind.h>

#include <pybind11/chrono.h>

#include "collectives/native.h"
#include "collectives/ring.h"

namespace py = pybind11;

namespace {

using dear::Exchange;
using dear::Lane;
using dear::Part;
using dear::Phase;
using dear::Reduction;
using NoGil = py::call_guard<py::gil_scoped_release>;

void bind_collectives(py::module_& m) {
  py::enum_<Phase>(m, "Phase")
      .value("reduce_scatter", Phase::kReduceScatter)
      .value("all_gather", Phase::kAllGather);
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
          [](Lane& lane, Phase phase, Reduction reduction, const std::vector<std::pair<at::Tensor, at::Tensor>>& pairs,
             std::string label) {
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

  py::class_<dear::RingLane, Lane, std::shared_ptr<dear::RingLane>>(m, "RingLane")
      .def(py::init<const c10::intrusive_ptr<c10d::Store>&, const std::string&, int, int, std::chrono::milliseconds>(),
           py::arg("store"), py::arg("key"), py::arg("rank"), py::arg("world"), py::arg("timeout"), NoGil());
  py::class_<dear::NativeLane, Lane, std::shared_ptr<dear::NativeLane>>(m, "NativeLane")
      .def(py::init<c10::intrusive_ptr<c10d::ProcessGroup>>(), py::arg("group"));

  m.def("shard_range", [](int64_t numel, int world, int rank) {
    const dear::Shards shards{numel, world};
    return std::make_pair(shards.begin(rank), shards.end(rank));
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Native part of dear: collectives, schedule and compressors.";
  bind_collectives(m);
}
