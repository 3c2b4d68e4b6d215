#include "schedule/parameters.h"

#include <c10/core/StorageImpl.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

#include "collectives/checksum.h"

namespace dear {
namespace {

// FNV-1a over 64-bit words.
uint64_t mix(uint64_t hash, uint64_t word) { return (hash ^ word) * 0x100000001b3ULL; }

// A Python object of a storage stays with it once there was one, and counts as a holder from torch 2.12 on.
template <typename Slot>
auto is_held_by_torch_alone(const Slot& slot, int) -> decltype(slot.has_unique_reference()) {
  return slot.has_unique_reference();
}
template <typename Slot>
bool is_held_by_torch_alone(const Slot&, long) {
  return false;
}

// Whether more than one tensor, or somebody in Python, holds the storage.
bool is_shared(const c10::Storage& storage) {
  const bool counted = is_held_by_torch_alone(*storage.unsafeGetStorageImpl()->pyobj_slot(), 0);
  return storage.use_count() > (counted ? 2 : 1);
}

void drop_tensor(void* context) { delete static_cast<at::Tensor*>(context); }

}  // namespace

uint64_t fingerprint(const std::vector<at::Tensor>& tensors) {
  uint64_t hash = 0xcbf29ce484222325ULL;
  for (const at::Tensor& tensor : tensors) {
    hash = mix(hash, tensor.has_storage() ? reinterpret_cast<uint64_t>(tensor.const_data_ptr()) : 0);
    hash = mix(hash, (static_cast<uint64_t>(tensor.scalar_type()) << 1) | (tensor.requires_grad() ? 1 : 0));
    for (const int64_t stride : tensor.strides()) hash = mix(hash, static_cast<uint64_t>(stride));
  }
  return hash;
}

std::vector<uint32_t> checksums(const std::vector<at::Tensor>& tensors) {
  std::vector<uint32_t> sums;
  sums.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    at::Tensor host = tensor.cpu();
    if (!host.is_non_overlapping_and_dense()) host = host.contiguous();
    sums.push_back(checksum(host.data_ptr(), host.nbytes(), 0));
  }
  return sums;
}

bool can_move(const at::Tensor& tensor) {
  if (!tensor.has_storage() || tensor.storage_offset() != 0 || !tensor.is_non_overlapping_and_dense())
    return false;
  const c10::Storage& storage = tensor.storage();
  // An array of numpy makes a storage non-resizable, and holds its address.
  return storage.nbytes() == tensor.nbytes() && storage.resizable() && !is_shared(storage);
}

void move_storage(const at::Tensor& tensor, const at::Tensor& target) {
  TORCH_CHECK(can_move(tensor) && target.is_contiguous() && target.nbytes() == tensor.nbytes() &&
                  target.scalar_type() == tensor.scalar_type() && target.device() == tensor.device(),
              "A storage can be moved only to as many contiguous elements of the same type.");
  target.as_strided(tensor.sizes(), tensor.strides(), target.storage_offset()).copy_(tensor.detach());
  c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
  if (!tensor.is_cpu()) {  // the copy may be on another stream than the one that the old memory goes back to
    const c10::impl::VirtualGuardImpl guard(tensor.device().type());
    guard.recordDataPtrOnStream(storage->data_ptr(), guard.getStream(tensor.device()));
  }
  storage->set_data_ptr(
      c10::DataPtr(target.mutable_data_ptr(), new at::Tensor(target), &drop_tensor, tensor.device()));
}

bool has_aliases(const std::vector<at::Tensor>& tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) {
    return is_shared(tensor.storage()) || !tensor.storage().resizable();
  });
}

bool exchange_grad(const at::Tensor& param, const at::Tensor& expected, const at::Tensor& value) {
  at::Tensor& grad = param.mutable_grad();  // Python code changes it under its lock, which the caller has
  if (!grad.is_same(expected)) return false;
  grad = value;
  return true;
}

void set_python_dispatch(const std::vector<at::Tensor>& tensors, bool on) {
  for (const at::Tensor& tensor : tensors) tensor.unsafeGetTensorImpl()->set_python_dispatch(on);
}

}  // namespace dear
