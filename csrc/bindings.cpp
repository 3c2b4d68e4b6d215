// The only file that knows both Python and C++.
#include <torch/csrc/utils/pybind.h>

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.doc() = "Native part of dear: collectives, schedule and compressors."; }
