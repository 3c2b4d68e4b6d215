// The schedule, dense and compressed, for Python.
#include <torch/csrc/jit/python/pybind_utils.h>

#include "bindings.h"
#include "schedule/comm_hook.h"
#include "schedule/gradients.h"
#include "schedule/parameters.h"
#include "schedule/unreduced.h"
#include "schedule/update_span.h"

namespace dear::bindings {
namespace {

void bind_parameters(py::module_& m) {
  m.def("fingerprint", &fingerprint, py::arg("tensors"));
  m.def("checksums", &checksums, py::arg("tensors"), NoGil());
  m.def("can_move", &can_move, py::arg("tensor"));
  m.def("move_storage", &move_storage, py::arg("tensor"), py::arg("target"));
  m.def("has_aliases", &has_aliases, py::arg("tensors"));
  m.def("exchange_grad", &exchange_grad, py::arg("param"), py::arg("expected"), py::arg("value"));
  py::class_<GradientWalk>(m, "GradientWalk")
      .def(py::init<std::vector<std::pair<at::Tensor, at::Tensor>>, std::vector<at::Tensor>>(),
           py::arg("expected"), py::arg("idle"))
      .def("look", [](const GradientWalk& self) {
        GradientWalk::Found found = self.look();
        return std::make_tuple(found.reduced, found.plain, std::move(found.missing), std::move(found.own));
      });
  m.def("set_python_dispatch", &set_python_dispatch, py::arg("tensors"), py::arg("on"));
}

void bind_scheduler(py::module_& m) {
  py::class_<Bucket>(m, "Bucket")
      .def_readonly("buffer", &Bucket::buffer)
      .def_readonly("params", &Bucket::params)
      .def_readonly("grads", &Bucket::grads);
  py::class_<BucketBuffers>(m, "BucketBuffers")
      .def(py::init([](at::Tensor shard, at::Tensor full, std::shared_ptr<Ownership> owners,
                       std::vector<std::shared_ptr<Ownership>> portions) {
             return BucketBuffers{std::move(shard), std::move(full), std::move(owners), std::move(portions)};
           }),
           py::arg("shard"), py::arg("full"), py::arg("owners"),
           py::arg("portions") = std::vector<std::shared_ptr<Ownership>>{});
  py::class_<TraceEvent>(m, "TraceEvent")
      .def_readonly("lane", &TraceEvent::lane)
      .def_readonly("name", &TraceEvent::name)
      .def_readonly("start_ns", &TraceEvent::start_ns)
      .def_readonly("end_ns", &TraceEvent::end_ns);
  py::class_<UpdateSpan>(m, "UpdateSpan")
      .def("__enter__", &UpdateSpan::begin)
      .def("__exit__",
           [](UpdateSpan& self, const py::object&, const py::object&, const py::object&) { self.end(); });
  py::class_<HookCalls, std::shared_ptr<HookCalls>>(m, "HookCalls")
      .def(py::init<>())
      .def_readonly("total", &HookCalls::total)
      .def_readonly("with_gil", &HookCalls::with_gil);

  py::class_<Scheduler, std::shared_ptr<Scheduler>>(m, "Scheduler")
      .def(py::init([](std::shared_ptr<Lane> reduce_lane, std::shared_ptr<Lane> gather_lane,
                       bool gather_gradients) {
             return make_shared_without_gil<Scheduler>(std::move(reduce_lane), std::move(gather_lane),
                                                       gather_gradients);
           }),
           py::arg("reduce_lane"), py::arg("gather_lane"), py::arg("gather_gradients"))
      .def("set_backward_ended",
           [](Scheduler& self, py::function callback, bool always) {
             // Steady state never enters Python: only a new layout does, unless the caller wants every pass.
             const auto held = hold(std::move(callback));
             self.set_backward_ended([held, always](bool layout_is_new, bool asked) {
               if (!layout_is_new && !always && !asked) return;
               py::gil_scoped_acquire acquire;
               (*held)(layout_is_new);
             });
             self.set_meets(always);
           })
      .def("ask_for_backward_end", &Scheduler::ask_for_backward_end)
      .def("clear_backward_ended", [](Scheduler& self) { self.set_backward_ended(nullptr); })
      .def("incoming", &Scheduler::incoming)
      .def("adopt_layout", &Scheduler::adopt_layout, py::arg("buffers"), py::arg("exchanges"),
           py::arg("placeholders"), py::arg("sizes"), py::arg("gather_order"), NoGil())
      .def("regroup", &Scheduler::regroup, py::arg("sizes"), py::arg("gather_order"), NoGil())
      .def("replace_buffers", &Scheduler::replace_buffers, py::arg("buffers"))
      .def("replace_placeholders", &Scheduler::replace_placeholders, py::arg("placeholders"))
      .def("forget_layout", &Scheduler::forget_layout, NoGil())
      .def("set_pipeline", &Scheduler::set_pipeline, py::arg("pipeline"))
      .def("any_dropped", &Scheduler::any_dropped, NoGil())
      .def("passes", &Scheduler::passes)
      .def("awaited_bucket", &Scheduler::awaited_bucket)
      .def("has_gradients", &Scheduler::has_gradients)
      .def("untouched", py::overload_cast<>(&Scheduler::untouched, py::const_))
      .def("gradients_used", &Scheduler::gradients_used)
      .def("reduced", &Scheduler::reduced)
      .def("wait_reduced", &Scheduler::wait_reduced, NoGil())
      .def("submit_gather", &Scheduler::submit_gather, py::arg("group"), py::arg("portion") = 0, NoGil())
      .def("wait_gathered", &Scheduler::wait_gathered, py::arg("group"), py::arg("portion") = 0, NoGil())
      .def("gathering", &Scheduler::gathering)
      .def("synchronize", &Scheduler::synchronize, NoGil())
      .def("take_wait_times",
           [](Scheduler& self) {
             const WaitTimes times = self.timeline().take_waits();
             return std::make_pair(times.reduce_scatter_ns, times.all_gather_ns);
           })
      .def("bytes_sent", &Scheduler::bytes_sent)
      .def("start_trace", [](Scheduler& self) { self.timeline().start(); })
      .def("stop_trace", [](Scheduler& self) { return self.timeline().stop(); })
      .def(
          "updating",
          [](std::shared_ptr<Scheduler> self, std::optional<size_t> group) {
            return std::make_unique<UpdateSpan>(std::move(self), group);
          },
          py::arg("group"))
      .def("release", &Scheduler::release, NoGil())
      .def("abort", &Scheduler::abort, NoGil());

  m.def(
      "rebuild_buckets",
      [](const std::shared_ptr<c10d::Reducer>& reducer, Scheduler& scheduler) {
        rebuild_buckets(*reducer, scheduler);
      },
      py::arg("reducer"), py::arg("hook"), NoGil());
  m.def(
      "rebuild_buckets",
      [](const std::shared_ptr<c10d::Reducer>& reducer, CompressedHook& hook) {
        rebuild_buckets(*reducer, hook);
      },
      py::arg("reducer"), py::arg("hook"), NoGil());
  m.def(
      "take_buckets",
      [](const std::shared_ptr<c10d::Reducer>& reducer, Scheduler& scheduler) {
        take_buckets(*reducer, scheduler);
      },
      py::arg("reducer"), py::arg("scheduler"), NoGil());
  py::class_<Unreduced>(m, "Unreduced")
      .def(py::init<const std::vector<at::Tensor>&, const std::shared_ptr<c10d::Reducer>&,
                    std::shared_ptr<Scheduler>>(),
           py::arg("params"), py::arg("reducer"), py::arg("scheduler"))
      .def("has", &Unreduced::has, py::arg("index"));
  m.def("expects_gradients",
        [](const std::shared_ptr<c10d::Reducer>& reducer) { return expects_gradients(*reducer); });
  m.def("register_scheduler",
        [](const std::shared_ptr<c10d::Reducer>& reducer, std::shared_ptr<Scheduler> scheduler,
           std::shared_ptr<HookCalls> calls, bool learns_graph) {
          register_scheduler(
              *reducer, std::move(scheduler), std::move(calls), [] { return PyGILState_Check() != 0; },
              learns_graph);
        });
}

CompressedHook::Callbacks make_callbacks(py::function bind, py::function measure, py::function ended) {
  CompressedHook::Callbacks callbacks;
  callbacks.bind = [call = hold(std::move(bind))](size_t index, const Bucket& bucket) {
    const py::gil_scoped_acquire acquire;
    return (*call)(index, bucket).cast<TwoPhaseExchanges>();
  };
  callbacks.measure = [call = hold(std::move(measure))](size_t index) {
    const py::gil_scoped_acquire acquire;
    (*call)(index);
  };
  callbacks.ended = [call = hold(std::move(ended))](const std::vector<size_t>& nonfinite) {
    const py::gil_scoped_acquire acquire;
    (*call)(nonfinite);
  };
  return callbacks;
}

void bind_compressed(py::module_& m) {
  py::class_<Pipeline::Counts>(m, "PipelineCounts")
      .def_readonly("bytes_sent", &Pipeline::Counts::bytes_sent)
      .def_readonly("encode_ns", &Pipeline::Counts::encode_ns)
      .def_readonly("between_ns", &Pipeline::Counts::between_ns)
      .def_readonly("decode_ns", &Pipeline::Counts::decode_ns);
  py::class_<Pipeline, std::shared_ptr<Pipeline>>(m, "Pipeline")
      .def(py::init([](std::vector<std::shared_ptr<Lane>> lanes,
                       std::vector<std::shared_ptr<Lane>> all_to_alls, at::Device device, int rank) {
             return make_shared_without_gil<Pipeline>(std::move(lanes), std::move(all_to_alls), device, rank);
           }),
           py::arg("lanes"), py::arg("all_to_alls"), py::arg("device"), py::arg("rank"))
      .def_property("steps", &Pipeline::steps, &Pipeline::set_steps)
      .def("abort", &Pipeline::abort, NoGil())
      .def_property_readonly("counts_of_step", &Pipeline::counts_of_step)
      .def_property_readonly("counts_of_last_step", &Pipeline::counts_of_last_step);

  py::class_<TwoPhaseExchange, std::shared_ptr<TwoPhaseExchange>>(m, "TwoPhaseExchange")
      .def(py::init([](std::shared_ptr<Pipeline> pipeline, std::shared_ptr<compress::Codec> codec,
                       std::string label, std::vector<at::Tensor> keeps, bool rolls_back) {
             return make_shared_without_gil<TwoPhaseExchange>(std::move(pipeline), std::move(codec),
                                                              std::move(label), std::move(keeps), rolls_back);
           }),
           py::arg("pipeline"), py::arg("codec"), py::arg("label"), py::arg("keeps"), py::arg("rolls_back"))
      .def(
          "bind",
          [](TwoPhaseExchange& self, const at::Tensor& source, const at::Tensor& target, int64_t begin,
             int64_t numel, const std::vector<std::tuple<int64_t, int64_t, int64_t>>& tuples) {
            std::vector<Run> runs;
            for (const auto& [in_bucket, in_group, length] : tuples)
              runs.push_back({in_bucket, in_group, length});
            self.bind(source, target, begin, numel, std::move(runs));
          },
          py::arg("source"), py::arg("target"), py::arg("begin"), py::arg("numel"), py::arg("runs"), NoGil())
      .def("keep_gradient", &TwoPhaseExchange::keep_gradient)
      .def("take_gradient",
           [](TwoPhaseExchange& self) -> std::optional<at::Tensor> {
             at::Tensor taken = self.take_gradient();
             return taken.defined() ? std::optional(std::move(taken)) : std::nullopt;
           })
      .def("compressed", &TwoPhaseExchange::compressed, NoGil())
      .def("has_nonfinite", &TwoPhaseExchange::has_nonfinite)
      .def("roll_back", &TwoPhaseExchange::roll_back, NoGil());

  py::class_<CompressedHook, std::shared_ptr<CompressedHook>>(m, "CompressedHook")
      .def(py::init([](std::shared_ptr<Pipeline> pipeline, py::function bind, py::function measure,
                       py::function ended) {
             return make_shared_without_gil<CompressedHook>(
                 std::move(pipeline), make_callbacks(std::move(bind), std::move(measure), std::move(ended)));
           }),
           py::arg("pipeline"), py::arg("bind"), py::arg("measure"), py::arg("ended"))
      .def(
          "on_bucket",
          [](CompressedHook& self, c10d::GradBucket& bucket) {
            c10::intrusive_ptr<c10::ivalue::Future> future;
            {
              const py::gil_scoped_release release;
              future = self.on_bucket(bucket.getIndex(),
                                      {bucket.getBuffer(), bucket.getParameters(), bucket.getGradients()});
            }
            return std::make_shared<torch::jit::PythonFutureWrapper>(future);
          },
          py::arg("bucket"))
      .def("set_always_ended", &CompressedHook::set_always_ended)
      .def("measure_next", &CompressedHook::measure_next)
      .def("forget", &CompressedHook::forget, NoGil())
      .def("roll_back", &CompressedHook::roll_back, NoGil())
      .def_property_readonly("exposed_ns", &CompressedHook::exposed_ns);

  m.def("register_compressed_hook",
        [](const std::shared_ptr<c10d::Reducer>& reducer, std::shared_ptr<CompressedHook> hook,
           std::shared_ptr<HookCalls> calls) {
          register_compressed_hook(*reducer, std::move(hook), std::move(calls),
                                   [] { return PyGILState_Check() != 0; });
        });
}

}  // namespace

void bind_schedule(py::module_& m) {
  bind_parameters(m);
  bind_compressed(m);  // the scheduler's signatures name its types
  bind_scheduler(m);
}

}  // namespace dear::bindings
