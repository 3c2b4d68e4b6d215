// The module, and what it asks of the interpreter.
#include "bindings.h"

#include "collectives/at_exit.h"
#include "collectives/interrupt.h"

namespace {

namespace py = pybind11;
using dear::bindings::NoGil;

// Runs the handlers of signals that have come, on the interpreter's main thread, which alone may.
unsigned long main_thread = 0;

void raise_if_interrupted() {
  if (PyThread_get_thread_ident() != main_thread || dear::bindings::interpreter_ends()) return;
  const py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The native part: collectives, schedule, compressors and what preconditioners compute.";
  dear::bindings::bind_collectives(m);
  dear::bindings::bind_compress(m);
  dear::bindings::bind_precondition(m);
  dear::bindings::bind_schedule(m);
  main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  dear::set_interrupt_check(&raise_if_interrupted);
  py::module_::import("atexit").attr("register")(py::cpp_function(&dear::stop_threads, NoGil()));
}
