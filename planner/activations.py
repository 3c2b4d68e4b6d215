"""What a model keeps from forward to backward, counted on torch's meta device: nothing is computed or held."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def inputs_of(shapes: Sequence[str], batch: int) -> list[torch.Tensor]:
    """Of ``3x224x224``, and ``128:int64`` where numbers are no floats: a batch of so many such examples, on the meta
    device.

    Raises:
        ValueError: of one sentence that names ``--input``.
    """
    made = []
    for text in shapes:
        found = re.fullmatch(r"(\d+(?:x\d+)*)(?::(\w+))?", text.strip())
        dtype = getattr(torch, found[2] or "float32", None) if found else None
        if found is None or not isinstance(dtype, torch.dtype):
            raise ValueError(f"--input must be one example's shape, such as 3x224x224 or 128:int64, not {text!r}.")
        made.append(torch.empty(batch, *map(int, found[1].split("x")), dtype=dtype, device="meta"))
    return made


def kept_bytes(net: nn.Module, inputs: Sequence[torch.Tensor]) -> int:
    """Of what autograd saves in a forward pass over these inputs, beside the model's own parameters and buffers. What
    several operations save counts once, and a view counts with all of the memory that it keeps."""
    own = {_storage(each) for each in (*net.parameters(), *net.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no other gets a former one's place

    def save(tensor: torch.Tensor) -> torch.Tensor:
        place = _storage(tensor)
        if place not in own:
            kept[place] = tensor.untyped_storage()
        return tensor

    was = net.training
    net.train()
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(save, _as_it_was), torch.device("meta"):
            outcome = net(*inputs)
    finally:
        net.train(was)
    del outcome
    return sum(storage.nbytes() for storage in kept.values())


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _as_it_was(tensor: Any) -> Any:
    return tensor
