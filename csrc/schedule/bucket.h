#pragma once

#include <ATen/ATen.h>
#include <ATen/core/ivalue.h>

#include <vector>

namespace dear {

// A bucket as DDP's reducer handed it over: the flat local gradients and the parameters in it.
struct Bucket {
  at::Tensor buffer;
  std::vector<at::Tensor> params;
  std::vector<at::Tensor> grads;  // views of `buffer`
};

// A future of that bucket's result.
inline c10::intrusive_ptr<c10::ivalue::Future> make_future(const at::Tensor& buffer) {
  std::vector<c10::Device> devices;
  if (!buffer.device().is_cpu()) devices.push_back(buffer.device());
  return c10::make_intrusive<c10::ivalue::Future>(c10::TensorType::get(), devices);
}

}  // namespace dear
