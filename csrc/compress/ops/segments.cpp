#include "compress/ops/segments.h"

#include <c10/util/Exception.h>

#include "compress/kernels/cpu/segments.h"
#include "compress/ops/operator.h"
#ifdef DEAR_CUDA_KERNELS
#include "compress/kernels/cuda/segments.h"
#include "compress/ops/launch.h"
#endif

namespace dear::compress::ops {

namespace {

const Segment* segments_of(const Tensor& table) {
  static_assert(sizeof(Segment) == 3 * sizeof(int64_t));
  return reinterpret_cast<const Segment*>(table.const_data_ptr<int64_t>());
}

// The table's segments, where it lies on the host.
const Segment* segments_within(const Tensor& table, const Tensor& grad, const Tensor& message) {
  const Segment* segments = segments_of(table);
  for (int64_t i = 0; i < table.size(0); ++i) {
    const Segment& segment = segments[i];
    TORCH_CHECK_VALUE(segment.within(grad.numel(), message.numel()), "a segment of ", segment.numel,
                      " elements from ", segment.start, " of a gradient of ", grad.numel(),
                      " does not go to ", segment.position, " of a message of ", message.numel(),
                      ": pass the table of this gradient and message.");
  }
  return segments;
}

struct ScatterSegments {
  static constexpr auto schema = "scatter_segments(Tensor message, Tensor table, Tensor(a!) out) -> ()";

  static void check(const Tensor& message, const Tensor& table, const Tensor& out) {
    check_grad(out);
    check_flat(message, at::kFloat, "the message");
    check_same_device(message, out, "the message", "the gradient");
    TORCH_CHECK_VALUE(table.dim() == 2 && table.size(1) == 3,
                      "the table of segments must be [segments, 3] of start, length and position, but it is ",
                      table.sizes(), ": pass one row for each segment.");
    check_table(table, table.numel(), out, "the table of segments");
  }
  static void cpu(const Tensor& message, const Tensor& table, const Tensor& out) {
    cpu::scatter_segments(message.const_data_ptr<float>(), segments_within(table, out, message),
                          table.size(0), grad_type(out), out.mutable_data_ptr());
  }
#ifdef DEAR_CUDA_KERNELS
  static void cuda(const Tensor& message, const Tensor& table, const Tensor& out) {
    const Launch launch(message);
    cuda::scatter_segments(message.const_data_ptr<float>(), message.numel(), segments_of(table),
                           table.size(0), grad_type(out), out.mutable_data_ptr(), out.numel(),
                           launch.stream());
    launch.check();
  }
#endif
};

struct GatherSegments {
  static constexpr auto schema =
      "gather_segments(Tensor source, Tensor table, Tensor(a!) message, Tensor(b!)? dropped) -> ()";

  static void check(const Tensor& source, const Tensor& table, const Tensor& message,
                    const OptionalTensor& dropped) {
    ScatterSegments::check(message, table, source);
    check_dropped(dropped, source);
  }
  static void cpu(const Tensor& source, const Tensor& table, const Tensor& message,
                  const OptionalTensor& dropped) {
    const Segment* segments = segments_within(table, source, message);
    add_count(dropped, cpu::gather_segments(source.const_data_ptr(), grad_type(source), segments,
                                            table.size(0), floats(message)));
  }
#ifdef DEAR_CUDA_KERNELS
  static void cuda(const Tensor& source, const Tensor& table, const Tensor& message,
                   const OptionalTensor& dropped) {
    const Launch launch(message);
    cuda::gather_segments(source.const_data_ptr(), grad_type(source), source.numel(), segments_of(table),
                          table.size(0), floats(message), message.numel(), words_or_null(dropped),
                          launch.stream());
    launch.check();
  }
#endif
};

}  // namespace

void gather_segments(const Tensor& source, const Tensor& table, const Tensor& message,
                     const OptionalTensor& dropped) {
  call<GatherSegments>(source, table, message, dropped);
}

void scatter_segments(const Tensor& message, const Tensor& table, const Tensor& out) {
  call<ScatterSegments>(message, table, out);
}

TORCH_LIBRARY_FRAGMENT(dear, m) {
  define<GatherSegments>(m);
  define<ScatterSegments>(m);
}

}  // namespace dear::compress::ops
