// How an operator is put together. Each is one struct in its family's file, with four static members:
//   schema   what torch is told;
//   check    what is demanded of the arguments: shapes, types and devices only, never data;
//   cpu      the kernel on host tensors;
//   cuda     the kernel on the current stream, where the module is built with CUDA. It never waits. (Tests
//            build a module where it is emulated on the host, in place of `cpu`: tests/cuda_on_host.)
// The three functions have one signature. define() registers the struct, call() is the way to it from C++.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <string>

namespace dear::compress::ops {

inline bool symbolic(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
}
inline bool symbolic(const std::optional<at::Tensor>& tensor) { return tensor && symbolic(*tensor); }
template <typename T>
bool symbolic(const T&) {
  return false;
}

// "sign_vote" of "sign_vote(Tensor payloads, ...) -> ()".
inline std::string name_of(const std::string& schema) { return schema.substr(0, schema.find('(')); }

template <typename Operator, typename Signature = decltype(Operator::check)>
struct Entry;

template <typename Operator, typename... Args>
struct Entry<Operator, void(Args...)> {
  static void cpu(Args... args) {
    Operator::check(args...);
    Operator::cpu(args...);
  }
#ifdef DEAR_CUDA_KERNELS
  static void cuda(Args... args) {
    Operator::check(args...);
    Operator::cuda(args...);
  }
#endif
  // Nothing is returned and no shape depends on data: on meta tensors an operator is its checks. Symbolic
  // sizes, which a compiler traces with, are left to the checks of the real call.
  static void meta(Args... args) {
    if (!(symbolic(args) || ...)) Operator::check(args...);
  }
};

template <typename Operator>
void define(torch::Library& library) {
  using Own = Entry<Operator>;
  const std::string name = name_of(Operator::schema);
  library.def(Operator::schema);
#ifdef DEAR_CUDA_ON_HOST
  library.impl(name.c_str(), torch::dispatch(c10::DispatchKey::CPU, &Own::cuda));
#else
  library.impl(name.c_str(), torch::dispatch(c10::DispatchKey::CPU, &Own::cpu));
#endif
#if defined(DEAR_CUDA_KERNELS) && !defined(DEAR_CUDA_ON_HOST)
  library.impl(name.c_str(), torch::dispatch(c10::DispatchKey::CUDA, &Own::cuda));
#endif
  library.impl(name.c_str(), torch::dispatch(c10::DispatchKey::Meta, &Own::meta));
}

// Through torch's dispatcher, so that the tensors' device picks the kernel.
template <typename Operator, typename... Args>
void call(const Args&... args) {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow(("dear::" + name_of(Operator::schema)).c_str(), "")
                                 .template typed<decltype(Operator::check)>();
  handle.call(args...);
}

}  // namespace dear::compress::ops
