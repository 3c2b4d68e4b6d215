// Codecs of compressors, for Python.
#include "bindings.h"
#include "compress/codecs/half.h"
#include "compress/codecs/levelled.h"
#include "compress/codecs/local_low_rank.h"
#include "compress/codecs/low_rank.h"
#include "compress/codecs/quantized.h"
#include "compress/codecs/sign.h"
#include "compress/codecs/topk.h"
#include "compress/codecs/two_level.h"

namespace dear::bindings {
namespace {

using compress::Codec;
using compress::Message;
using compress::StagedCodec;
using compress::StartStep;
using OptionalTensor = std::optional<at::Tensor>;

// A compressor written in Python: an object with advance(step, stage), stages(step), bind(gradient, result),
// compresses(step), all_to_all(step, stage) and nonfinite(), called with the GIL.
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
  bool all_to_all(int64_t step, size_t stage) const override {
    const py::gil_scoped_acquire acquire;
    return object_.attr("all_to_all")(step, stage).cast<bool>();
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
    const py::object nonfinite = object_.attr("nonfinite")();
    nonfinite_ = nonfinite.is_none() ? at::Tensor() : nonfinite.cast<at::Tensor>();
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
  m.attr("SCALE_UNIT") = compress::kScaleUnit;
  m.def("quantized_words", &compress::quantized_words, py::arg("shard"));
  m.def("levelled_words", &compress::levelled_words, py::arg("shard"), py::arg("bits"));
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
      .def("first_stages", &Codec::first_stages, NoGil())
      .def("advance", &Codec::advance, py::arg("step"), py::arg("stage"), NoGil())
      .def("bind", &Codec::bind, py::arg("gradient"), py::arg("result"), NoGil())
      .def("compresses", &Codec::compresses, NoGil())
      .def("settle", &Codec::settle, NoGil())
      .def("dropped", &Codec::dropped)
      .def("nonfinite", [](const Codec& codec) -> OptionalTensor {
        return codec.nonfinite().defined() ? OptionalTensor(codec.nonfinite()) : std::nullopt;
      });
  py::class_<PythonCodec, Codec, std::shared_ptr<PythonCodec>>(m, "PythonCodec")
      .def(py::init<at::Tensor, py::object>(), py::arg("dropped"), py::arg("object"));
  py::class_<compress::DenseCodec, Codec, std::shared_ptr<compress::DenseCodec>>(m, "DenseCodec")
      .def(py::init<at::Device, int64_t, int64_t>(), py::arg("device"), py::arg("rank"), py::arg("world"));
  py::class_<compress::TwoLevelCodec, Codec, std::shared_ptr<compress::TwoLevelCodec>>(m, "TwoLevelCodec")
      .def(py::init<at::Device, std::shared_ptr<Codec>, std::shared_ptr<Ownership>, int64_t,
                    std::vector<std::shared_ptr<Codec>>, int64_t>(),
           py::arg("device"), py::arg("inner"), py::arg("owners"), py::arg("place"), py::arg("readers"),
           py::arg("between"));
  py::class_<StartStep, std::shared_ptr<StartStep>>(m, "StartStep")
      .def(py::init<int64_t>(), py::arg("step"))
      .def_property("step", &StartStep::get, &StartStep::set);
  py::class_<StagedCodec, Codec, std::shared_ptr<StagedCodec>>(m, "StagedCodec")
      .def(py::init([](at::Device device, std::shared_ptr<StartStep> start, std::shared_ptr<Codec> dense,
                       const std::vector<std::pair<int64_t, std::shared_ptr<Codec>>>& compressed) {
             std::vector<compress::CodecStage> stages;
             for (const auto& [begin, codec] : compressed) stages.push_back({begin, codec});
             return std::make_shared<StagedCodec>(device, std::move(start), std::move(dense),
                                                  std::move(stages));
           }),
           py::arg("device"), py::arg("start"), py::arg("dense"), py::arg("compressed"));
  py::class_<compress::SignCodec, Codec, std::shared_ptr<compress::SignCodec>>(m, "SignCodec")
      .def(py::init<at::Device, int64_t, int64_t, int64_t, int64_t, OptionalTensor, OptionalTensor, bool>(),
           py::arg("device"), py::arg("rank"), py::arg("world"), py::arg("words"), py::arg("owned"),
           py::arg("error"), py::arg("owner_error"), py::arg("scaled"));
  py::class_<compress::HalfCodec, Codec, std::shared_ptr<compress::HalfCodec>>(m, "HalfCodec")
      .def(py::init<at::Device, int64_t, int64_t, int64_t, int64_t, at::ScalarType, OptionalTensor,
                    OptionalTensor>(),
           py::arg("device"), py::arg("rank"), py::arg("world"), py::arg("shard"), py::arg("owned"),
           py::arg("dtype"), py::arg("error"), py::arg("owner_error"));
  py::class_<compress::QuantizedCodec, Codec, std::shared_ptr<compress::QuantizedCodec>>(m, "QuantizedCodec")
      .def(py::init<at::Device, int64_t, int64_t, int64_t, int64_t, bool, int64_t, OptionalTensor,
                    OptionalTensor>(),
           py::arg("device"), py::arg("rank"), py::arg("world"), py::arg("shard"), py::arg("owned"),
           py::arg("floating"), py::arg("seed"), py::arg("error"), py::arg("owner_error"));
  py::class_<compress::LevelledCodec, Codec, std::shared_ptr<compress::LevelledCodec>>(m, "LevelledCodec")
      .def(py::init<at::Device, int64_t, int64_t, int64_t, int64_t, int64_t, OptionalTensor, OptionalTensor,
                    OptionalTensor>(),
           py::arg("device"), py::arg("rank"), py::arg("world"), py::arg("shard"), py::arg("owned"),
           py::arg("bits"), py::arg("error"), py::arg("owner_error"), py::arg("squares"));
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
      .def(py::init<at::Device, int64_t, int64_t, std::vector<MatrixBatch>, at::Tensor, int64_t,
                    std::optional<at::ScalarType>, std::shared_ptr<StartStep>>(),
           py::arg("device"), py::arg("rank"), py::arg("world"), py::arg("batches"), py::arg("segments"),
           py::arg("dense_numel"), py::arg("wire"), py::arg("start"));
  py::class_<compress::PowerCodec, Codec, std::shared_ptr<compress::PowerCodec>>(m, "PowerCodec")
      .def(py::init<at::Device, int64_t, int64_t, std::vector<MatrixBatch>, at::Tensor, int64_t,
                    std::optional<at::ScalarType>>(),
           py::arg("device"), py::arg("rank"), py::arg("world"), py::arg("batches"), py::arg("segments"),
           py::arg("dense_numel"), py::arg("wire"));
  py::class_<compress::LocalCodec, Codec, std::shared_ptr<compress::LocalCodec>>(m, "LocalCodec")
      .def(py::init<at::Device, int64_t, int64_t, std::vector<MatrixBatch>, at::Tensor, int64_t,
                    std::optional<at::ScalarType>>(),
           py::arg("device"), py::arg("rank"), py::arg("world"), py::arg("batches"), py::arg("segments"),
           py::arg("dense_numel"), py::arg("wire"));
}

}  // namespace

void bind_compress(py::module_& m) { bind_codecs(m); }

}  // namespace dear::bindings
