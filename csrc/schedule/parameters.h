#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace dear {

// What the schedule must know of parameters, beyond what tensors say in Python.
//
// Note [Moving storage]
// With sharded updates parameters live in flat buffers. `param.data = view` would leave behind whoever takes
// another tensor of the same storage before or after (a kept state_dict(), `p.detach()`, `p.data`): plain DDP
// changes the values under them. So the storage itself is made to point to its part of the buffer, and later
// aliases of it follow. A parameter whose storage somebody else holds already, by whatever means, stays where
// it is: its values are copied to and fro.

// A number that changes when any of the tensors changes its place in memory, its strides, its type or whether
// it requires a gradient.
uint64_t fingerprint(const std::vector<at::Tensor>& tensors);

// A checksum of each tensor's bytes, as they lie in memory; device tensors are copied to the host for it.
std::vector<uint32_t> checksums(const std::vector<at::Tensor>& tensors);

// Whether move_storage() may move the tensor: it is all of its storage, densely, and nobody else holds that.
bool can_move(const at::Tensor& tensor);

// Copies the tensor to `target`, as many contiguous elements of its type, and makes its storage point there.
void move_storage(const at::Tensor& tensor, const at::Tensor& target);

// Whether anybody but the tensor itself holds the storage of one of them: a view or an alias.
bool has_aliases(const std::vector<at::Tensor>& tensors);

// Puts `value` into .grad where `expected` stands, in one: another thread may set it to None meanwhile. Says
// whether it stood there.
bool exchange_grad(const at::Tensor& param, const at::Tensor& expected, const at::Tensor& value);

// Sends every operator that meets one of the tensors to the __torch_dispatch__ of its Python class, or no
// longer.
void set_python_dispatch(const std::vector<at::Tensor>& tensors, bool on);

}  // namespace dear
