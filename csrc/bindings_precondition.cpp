// What preconditioners compute on host tensors, for Python.
#include "bindings.h"
#include "precondition/capture.h"
#include "precondition/rank_one.h"
#include "precondition/triangles.h"

namespace dear::bindings {
namespace {

using precondition::MeanCapture;
using precondition::Rectangle;
using precondition::Windows;

// Python has one list for each field: a list of tensors costs next to nothing to convert, one of objects
// does.
std::vector<Rectangle> rectangles(const std::vector<at::Tensor>& views, const std::vector<int64_t>& layers,
                                  const std::vector<int64_t>& rows, const std::vector<int64_t>& columns) {
  TORCH_CHECK_VALUE(
      layers.size() == views.size() && rows.size() == views.size() && columns.size() == views.size(),
      "the lists must be of one length.");
  std::vector<Rectangle> found;
  found.reserve(views.size());
  for (size_t i = 0; i < views.size(); ++i) {
    found.push_back({views[i], layers[i], rows[i], columns[i]});
  }
  return found;
}

// Of eva_host.Place in Python.
precondition::CapturedLayer captured(const py::tuple& layer) {
  precondition::CapturedLayer found{py::cast<at::Tensor>(layer[0]),  py::cast<int64_t>(layer[1]),
                                    py::cast<int64_t>(layer[2]),     {},
                                    py::cast<std::string>(layer[4]), py::cast<std::vector<int64_t>>(layer[5]),
                                    py::cast<int64_t>(layer[6])};
  for (const auto& [before, after, size, step, stride] :
       py::cast<std::vector<std::array<int64_t, 5>>>(layer[3])) {
    found.sides.push_back({before, after, size, step, stride});
  }
  return found;
}

}  // namespace

void bind_precondition(py::module_& m) {
  m.def(
      "add_products",
      [](const std::vector<at::Tensor>& views, const std::vector<int64_t>& layers,
         const std::vector<int64_t>& rows, const std::vector<int64_t>& columns, const at::Tensor& a,
         const at::Tensor& products, const at::Tensor& squares) {
        precondition::add_products(rectangles(views, layers, rows, columns), a, products, squares);
      },
      NoGil(), py::arg("views"), py::arg("layers"), py::arg("rows"), py::arg("columns"), py::arg("a"),
      py::arg("products"), py::arg("squares"));
  m.def(
      "subtract_products",
      [](const std::vector<at::Tensor>& views, const std::vector<int64_t>& layers,
         const std::vector<int64_t>& rows, const std::vector<int64_t>& columns, const at::Tensor& w,
         const at::Tensor& a,
         double factor) { precondition::subtract(rectangles(views, layers, rows, columns), w, a, factor); },
      NoGil(), py::arg("views"), py::arg("layers"), py::arg("rows"), py::arg("columns"), py::arg("w"),
      py::arg("a"), py::arg("factor"));
  m.def(
      "update_means",
      [](at::Tensor columns, at::Tensor rows, const at::Tensor& known, const at::Tensor& used,
         at::Tensor step_columns, at::Tensor step_rows, const std::vector<int64_t>& first_column,
         const std::vector<int64_t>& first_row, double decay) {
        precondition::update_means({std::move(columns), std::move(rows)}, known, used,
                                   {std::move(step_columns), std::move(step_rows)}, first_column, first_row,
                                   decay);
      },
      NoGil(), py::arg("columns"), py::arg("rows"), py::arg("known"), py::arg("used"),
      py::arg("step_columns"), py::arg("step_rows"), py::arg("first_column"), py::arg("first_row"),
      py::arg("decay"));
  m.def("dot_by_block", &precondition::dot_by_block, NoGil(), py::arg("x"), py::arg("y"), py::arg("first"));
  m.def(
      "eva_correction",
      [](at::Tensor columns, at::Tensor rows, at::Tensor inner, at::Tensor squares,
         std::vector<int64_t> first_column, std::vector<int64_t> first_row, std::vector<int64_t> first_block,
         std::vector<bool> has_bias, std::vector<double> learning_rates, double damping,
         std::optional<double> kl_clip) {
        auto found = precondition::eva_correction(
            {std::move(columns), std::move(rows), std::move(inner), std::move(squares),
             std::move(first_column), std::move(first_row), std::move(first_block), std::move(has_bias),
             std::move(learning_rates), damping, kl_clip});
        return std::make_pair(std::move(found.rows), found.factor);
      },
      NoGil(), py::arg("columns"), py::arg("rows"), py::arg("inner"), py::arg("squares"),
      py::arg("first_column"), py::arg("first_row"), py::arg("first_block"), py::arg("has_bias"),
      py::arg("learning_rates"), py::arg("damping"), py::arg("kl_clip"));
  py::class_<MeanCapture, std::shared_ptr<MeanCapture>>(m, "MeanCapture")
      .def(py::init([](const py::list& layers, const at::Tensor& like, int64_t columns, int64_t rows) {
             std::vector<precondition::CapturedLayer> found;
             for (const auto& each : layers) {
               found.push_back(captured(py::cast<py::tuple>(each)));
             }
             return std::make_shared<MeanCapture>(std::move(found), like.scalar_type(), columns, rows);
           }),
           py::arg("layers"), py::arg("like"), py::arg("columns"), py::arg("rows"))
      .def("see", &MeanCapture::see, NoGil(), py::arg("layer"), py::arg("x"), py::arg("output"))
      .def("message", &MeanCapture::message, NoGil(), py::arg("scale"))
      .def("forget", &MeanCapture::forget, NoGil());
  m.def("finite_message", &precondition::finite_message, NoGil(), py::arg("flags"), py::arg("parts"));
  m.def("write_triangles", &precondition::write_triangles, NoGil(), py::arg("matrices"),
        py::arg("triangles"));
  m.def("from_triangles", &precondition::from_triangles, NoGil(), py::arg("triangles"), py::arg("blocks"),
        py::arg("n"));
  m.def(
      "mean_of_windows",
      [](const at::Tensor& image, const std::vector<std::array<int64_t, 5>>& windows) {
        std::vector<Windows> found;
        found.reserve(windows.size());
        for (const auto& [before, size, step, stride, count] : windows) {
          found.push_back({before, size, step, stride, count});
        }
        return precondition::mean_of_windows(image, found);
      },
      NoGil(), py::arg("image"), py::arg("windows"));
}

}  // namespace dear::bindings
