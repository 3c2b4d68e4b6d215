// Only bindings*.cpp know both Python and C++.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <utility>

namespace dear::bindings {

namespace py = pybind11;
using NoGil = py::call_guard<py::gil_scoped_release>;

inline bool interpreter_ends() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

// A shared pointer whose object is destroyed without the GIL: its threads may want it before they end. When
// the interpreter itself ends they are not to have it, and it is not to be given away.
template <typename T, typename... Args>
std::shared_ptr<T> make_shared_without_gil(Args&&... args) {
  return std::shared_ptr<T>(new T(std::forward<Args>(args)...), [](T* object) {
    if (PyGILState_Check() != 0 && !interpreter_ends()) {
      const py::gil_scoped_release release;
      delete object;
    } else {
      delete object;
    }
  });
}

// A function that whoever holds it may drop without the GIL.
inline std::shared_ptr<py::function> hold(py::function function) {
  return std::shared_ptr<py::function>(new py::function(std::move(function)), [](py::function* held) {
    const py::gil_scoped_acquire acquire;
    delete held;
  });
}

void bind_collectives(py::module_& m);
void bind_compress(py::module_& m);
void bind_precondition(py::module_& m);
void bind_schedule(py::module_& m);

}  // namespace dear::bindings
