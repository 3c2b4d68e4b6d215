// Only bindings*.cpp know both Python and C++.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <utility>

namespace dear::bindings {

namespace py = pybind11;
using NoGil = py::call_guard<py::gil_scoped_release>;

// A shared pointer whose object is destroyed without the GIL: its threads may want it before they end.
template <typename T, typename... Args>
std::shared_ptr<T> make_shared_without_gil(Args&&... args) {
  return std::shared_ptr<T>(new T(std::forward<Args>(args)...), [](T* object) {
    if (PyGILState_Check() != 0) {
      const py::gil_scoped_release release;
      delete object;
    } else {
      delete object;
    }
  });
}

void bind_compress(py::module_& m);

}  // namespace dear::bindings
