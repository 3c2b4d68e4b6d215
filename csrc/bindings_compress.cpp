// Codecs, pipelines and the driver of compressors, for Python.
#include <torch/csrc/jit/python/pybind_utils.h>

#include "bindings.h"
#include "compress/codecs/half.h"
#include "compress/codecs/low_rank.h"
#include "compress/codecs/sign.h"
#include "compress/codecs/topk.h"
#include "schedule/comm_hook.h"

namespace dear::bindings {
namespace {

using compress::Codec;
using compress::Message;
using OptionalTensor = std::optional<at::Tensor>;

// A compressor written in Python: an object with advance(step, stage), stages(step), bind(gradient, result),
// compresses(step) and bad(), called with the GIL.
class PythonCodec : public Codec {
 public:
  PythonCodec(at::Tensor dropped, py::object object) : Codec(dropped.device()), object_(std::move(object)) {
    dropped_ = std::move(dropped);
  }
  ~PythonCodec() override {
    const py::gil_scoped_acquire acquire;
    object_ = py::object();
  }

  size_t stages(int64_t step) const override {
    const py::gil_scoped_acquire acquire;
    return object_.attr("stages")(step).cast<size_t>();
  }
  bool compresses(int64_t step) const override {
    const py::gil_scoped_acquire acquire;
    return object_.attr("compresses")(step).cast<bool>();
  }
  void bind(at::Tensor gradient, at::Tensor result) override {
    const py::gil_scoped_acquire acquire;
    object_.attr("bind")(gradient, result);
  }
  std::optional<Message> advance(int64_t step, size_t stage) override {
    const py::gil_scoped_acquire acquire;
    const py::object said = object_.attr("advance")(step, stage);
    if (!said.is_none()) {
      const auto message = said.cast<py::tuple>();
      return Message{message[0].cast<Phase>(), message[1].cast<at::Tensor>(),
                     message[2].is_none() ? at::Tensor() : message[2].cast<at::Tensor>()};
    }
    const py::object bad = object_.attr("bad")();
    bad_ = bad.is_none() ? at::Tensor() : bad.cast<at::Tensor>();
    return std::nullopt;
  }

 private:
  py::object object_;
};

// The sizes of payloads and workspaces, which Python allocates and the operators check: layout.h is where
// they are written.
void bind_sizes(py::module_& m) {
  m.attr("BLOCK") = compress::kBlock;
  m.attr("SIGN_RECORD") = compress::kSignRecord;
  m.def("sign_payload_numel", &compress::sign_payload_numel, py::arg("numel"));
  m.def("topk_slot_numel", &compress::slot_words, py::arg("capacity"));
  m.def("topk_workspace_numel", &compress::topk_workspace_numel, py::arg("numel"));
  m.def("orthogonalize_workspace_numel", &compress::orthogonalize_workspace_numel, py::arg("batch"),
        py::arg("rows"), py::arg("columns"));
}

void bind_codecs(py::module_& m) {
  using compress::MatrixBatch;

  bind_sizes(m);
  py::class_<Message>(m, "Message")
      .def_readonly("phase", &Message::phase)
      .def_readonly("full", &Message::full)
      .def_readonly("shard", &Message::shard);

  py::class_<Codec, std::shared_ptr<Codec>>(m, "Codec")
      .def("stages", &Codec::stages, NoGil())
      .def("advance", &Codec::advance, py::arg("step"), py::arg("stage"), NoGil())
      .def("bind", &Codec::bind, py::arg("gradient"), py::arg("result"), NoGil())
      .def("compresses", &Codec::compresses, NoGil())
      .def("dropped", &Codec::dropped)
      .def("bad", [](const Codec& codec) -> OptionalTensor {
        return codec.bad().defined() ? OptionalTensor(codec.bad()) : std::nullopt;
      });
  py::class_<PythonCodec, Codec, std::shared_ptr<PythonCodec>>(m, "PythonCodec")
      .def(py::init<at::Tensor, py::object>(), py::arg("dropped"), py::arg("object"));
  py::class_<compress::DenseCodec, Codec, std::shared_ptr<compress::DenseCodec>>(m, "DenseCodec")
      .def(py::init<at::Device, int64_t, int64_t>(), py::arg("device"), py::arg("rank"), py::arg("world"));
  py::class_<compress::StartingCodec, Codec, std::shared_ptr<compress::StartingCodec>>(m, "StartingCodec")
      .def(py::init<at::Device, std::shared_ptr<Codec>, std::shared_ptr<Codec>, int64_t>(), py::arg("device"),
           py::arg("dense"), py::arg("compressed"), py::arg("start_step"));
  py::class_<compress::SignCodec, Codec, std::shared_ptr<compress::SignCodec>>(m, "SignCodec")
      .def(py::init<at::Device, int64_t, int64_t, int64_t, int64_t, OptionalTensor, OptionalTensor, bool>(),
           py::arg("device"), py::arg("rank"), py::arg("world"), py::arg("words"), py::arg("owned"),
           py::arg("error"), py::arg("owner_error"), py::arg("scaled"));
  py::class_<compress::HalfCodec, Codec, std::shared_ptr<compress::HalfCodec>>(m, "HalfCodec")
      .def(py::init<at::Device, int64_t, int64_t, int64_t, int64_t, at::ScalarType, OptionalTensor,
                    OptionalTensor>(),
           py::arg("device"), py::arg("rank"), py::arg("world"), py::arg("shard"), py::arg("owned"),
           py::arg("dtype"), py::arg("error"), py::arg("owner_error"));
  py::class_<compress::TopKCodec, Codec, std::shared_ptr<compress::TopKCodec>>(m, "TopKCodec")
      .def(py::init<at::Device, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                    int64_t, OptionalTensor, OptionalTensor>(),
           py::arg("device"), py::arg("rank"), py::arg("world"), py::arg("numel"), py::arg("shard"),
           py::arg("owned"), py::arg("k"), py::arg("owner_k"), py::arg("capacity"), py::arg("stretch"),
           py::arg("error"), py::arg("owner_error"))
      .def_property_readonly("selected", &compress::TopKCodec::selected)
      .def_property_readonly("threshold", &compress::TopKCodec::threshold);

  py::class_<MatrixBatch>(m, "MatrixBatch")
      .def(py::init([](at::Tensor starts, OptionalTensor error, at::Tensor p, at::Tensor q) {
             return MatrixBatch{std::move(starts), std::move(error), std::move(p), std::move(q)};
           }),
           py::arg("starts"), py::arg("error"), py::arg("p"), py::arg("q"));
  py::class_<compress::AcpCodec, Codec, std::shared_ptr<compress::AcpCodec>>(m, "AcpCodec")
      .def(py::init<at::Device, int64_t, int64_t, std::vector<MatrixBatch>, at::Tensor, int64_t, int64_t>(),
           py::arg("device"), py::arg("rank"), py::arg("world"), py::arg("batches"), py::arg("segments"),
           py::arg("dense_numel"), py::arg("start_step"));
  py::class_<compress::PowerCodec, Codec, std::shared_ptr<compress::PowerCodec>>(m, "PowerCodec")
      .def(py::init<at::Device, int64_t, int64_t, std::vector<MatrixBatch>, at::Tensor, int64_t>(),
           py::arg("device"), py::arg("rank"), py::arg("world"), py::arg("batches"), py::arg("segments"),
           py::arg("dense_numel"));
}

CompressDriver::Callbacks make_callbacks(py::function bind, py::function measure, py::function ended) {
  CompressDriver::Callbacks callbacks;
  callbacks.bind = [call = hold(std::move(bind))](size_t index, const Bucket& bucket) {
    const py::gil_scoped_acquire acquire;
    return (*call)(index, bucket).cast<Relays>();
  };
  callbacks.measure = [call = hold(std::move(measure))](size_t index) {
    const py::gil_scoped_acquire acquire;
    (*call)(index);
  };
  callbacks.ended = [call = hold(std::move(ended))](const std::vector<size_t>& bad) {
    const py::gil_scoped_acquire acquire;
    (*call)(bad);
  };
  return callbacks;
}

void bind_driver(py::module_& m) {
  py::class_<Pipeline::Counts>(m, "PipelineCounts")
      .def_readonly("bytes_sent", &Pipeline::Counts::bytes_sent)
      .def_readonly("encode_ns", &Pipeline::Counts::encode_ns)
      .def_readonly("between_ns", &Pipeline::Counts::between_ns)
      .def_readonly("decode_ns", &Pipeline::Counts::decode_ns);
  py::class_<Pipeline, std::shared_ptr<Pipeline>>(m, "Pipeline")
      .def(py::init([](std::vector<std::shared_ptr<Lane>> lanes, std::shared_ptr<Lane> all_to_all,
                       at::Device device) {
             return make_shared_without_gil<Pipeline>(std::move(lanes), std::move(all_to_all), device);
           }),
           py::arg("lanes"), py::arg("all_to_all"), py::arg("device"))
      .def_property("steps", &Pipeline::steps, &Pipeline::set_steps)
      .def("abort", &Pipeline::abort, NoGil())
      .def_property_readonly("counts_of_step", &Pipeline::counts_of_step)
      .def_property_readonly("counts_of_last_step", &Pipeline::counts_of_last_step);

  py::class_<Relay, std::shared_ptr<Relay>>(m, "Relay")
      .def(py::init([](std::shared_ptr<Pipeline> pipeline, std::shared_ptr<Codec> codec, std::string label,
                       std::vector<at::Tensor> keeps, bool rolls_back) {
             return make_shared_without_gil<Relay>(std::move(pipeline), std::move(codec), std::move(label),
                                                   std::move(keeps), rolls_back);
           }),
           py::arg("pipeline"), py::arg("codec"), py::arg("label"), py::arg("keeps"), py::arg("rolls_back"))
      .def(
          "bind",
          [](Relay& self, const at::Tensor& source, const at::Tensor& target, int64_t begin, int64_t numel,
             const std::vector<std::tuple<int64_t, int64_t, int64_t>>& tuples) {
            std::vector<Run> runs;
            for (const auto& [in_bucket, in_group, length] : tuples)
              runs.push_back({in_bucket, in_group, length});
            self.bind(source, target, begin, numel, std::move(runs));
          },
          py::arg("source"), py::arg("target"), py::arg("begin"), py::arg("numel"), py::arg("runs"), NoGil())
      .def("compressed", &Relay::compressed, NoGil())
      .def("is_bad", &Relay::is_bad)
      .def("roll_back", &Relay::roll_back, NoGil());

  py::class_<CompressDriver, std::shared_ptr<CompressDriver>>(m, "CompressDriver")
      .def(py::init([](std::shared_ptr<Pipeline> pipeline, py::function bind, py::function measure,
                       py::function ended) {
             return make_shared_without_gil<CompressDriver>(
                 std::move(pipeline), make_callbacks(std::move(bind), std::move(measure), std::move(ended)));
           }),
           py::arg("pipeline"), py::arg("bind"), py::arg("measure"), py::arg("ended"))
      .def(
          "on_bucket",
          [](CompressDriver& self, c10d::GradBucket& bucket) {
            c10::intrusive_ptr<c10::ivalue::Future> future;
            {
              const py::gil_scoped_release release;
              future = self.on_bucket(bucket.getIndex(),
                                      {bucket.getBuffer(), bucket.getParameters(), bucket.getGradients()});
            }
            return std::make_shared<torch::jit::PythonFutureWrapper>(future);
          },
          py::arg("bucket"))
      .def("set_always_ended", &CompressDriver::set_always_ended)
      .def("measure_next", &CompressDriver::measure_next)
      .def("forget", &CompressDriver::forget, NoGil())
      .def("roll_back", &CompressDriver::roll_back, NoGil())
      .def_property_readonly("exposed_ns", &CompressDriver::exposed_ns);

  m.def("register_driver", [](const std::shared_ptr<c10d::Reducer>& reducer,
                              std::shared_ptr<CompressDriver> driver, std::shared_ptr<HookCalls> calls) {
    register_driver(*reducer, std::move(driver), std::move(calls), [] { return PyGILState_Check() != 0; });
  });
}

}  // namespace

void bind_compress(py::module_& m) {
  bind_codecs(m);
  bind_driver(m);
}

}  // namespace dear::bindings
