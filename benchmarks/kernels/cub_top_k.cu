// The k-th largest magnitude of a sum, by CUB: a rival of this library's own kernel, for the benchmark alone.
// DeviceTopK where the CCCL of this compiler has it (3.3 and later), else DeviceRadixSort, which sorts all.

#include <cuda_runtime.h>

#include <cub/version.cuh>

#if CUB_VERSION >= 300300 && __has_include(<cub/device/device_topk.cuh>)
#define HAS_TOP_K
#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>

#include <cub/device/device_reduce.cuh>
#include <cub/device/device_topk.cuh>
#include <cuda/std/functional>
#else
#include <thrust/iterator/counting_iterator.h>

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_transform.cuh>
#endif

namespace {

struct Magnitude {
  const float* grad;
  const float* error;
  __device__ float operator()(unsigned int i) const { return fabsf(grad[i] + error[i]); }
};

}  // namespace

extern "C" {

int dear_cub_has_top_k() {
#ifdef HAS_TOP_K
  return 1;
#else
  return 0;
#endif
}

const char* dear_cub_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

// With `workspace` null, only writes how many bytes of it are needed. `keys` has room for 2 n elements; the
// threshold goes to `out`. Everything runs on `stream`; returns CUDA's error code.
int dear_cub_threshold(void* workspace, size_t* bytes, const float* grad, const float* error, float* keys,
                       float* out, unsigned int n, unsigned int k, cudaStream_t stream);
}

#ifdef HAS_TOP_K

int dear_cub_threshold(void* workspace, size_t* bytes, const float* grad, const float* error, float* keys,
                       float* out, unsigned int n, unsigned int k, cudaStream_t stream) {
  const auto in = thrust::make_transform_iterator(thrust::make_counting_iterator(0u), Magnitude{grad, error});
  const auto wanted = cuda::execution::require(cuda::execution::determinism::not_guaranteed,
                                               cuda::execution::output_ordering::unsorted);
  const auto env = cuda::std::execution::env{cuda::stream_ref{stream}, wanted};
  size_t selects = *bytes;
  size_t reduces = *bytes;
  cudaError_t code = cub::DeviceTopK::MaxKeys(workspace, selects, in, keys, n, k, env);
  if (code == cudaSuccess) code = cub::DeviceReduce::Min(workspace, reduces, keys, out, k, stream);
  if (workspace == nullptr) *bytes = selects > reduces ? selects : reduces;
  return code;
}

#else

int dear_cub_threshold(void* workspace, size_t* bytes, const float* grad, const float* error, float* keys,
                       float* out, unsigned int n, unsigned int k, cudaStream_t stream) {
  if (workspace != nullptr) {
    const auto indices = thrust::make_counting_iterator(0u);
    const cudaError_t code =
        cub::DeviceTransform::Transform(indices, keys, n, Magnitude{grad, error}, stream);
    if (code != cudaSuccess) return code;
  }
  float* sorted = keys + n;
  cudaError_t code =
      cub::DeviceRadixSort::SortKeysDescending(workspace, *bytes, keys, sorted, n, 0, 32, stream);
  if (code == cudaSuccess && workspace != nullptr) {
    code = cudaMemcpyAsync(out, sorted + k - 1, sizeof(float), cudaMemcpyDeviceToDevice, stream);
  }
  return code;
}

#endif
