// The library of operators. Each family registers its own in its file.
#include <ATen/Parallel.h>
#include <torch/library.h>

namespace {

// at::parallel_for is a template: without OpenMP at the build of this module it runs on one thread, and says
// nothing.
int64_t kernel_threads() {
#ifdef INTRA_OP_PARALLEL
  return at::get_num_threads();
#else
  return 1;
#endif
}

}  // namespace

TORCH_LIBRARY(dear, m) { m.def("kernel_threads() -> int", &kernel_threads); }
