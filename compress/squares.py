"""Running means of the squares of results, by parameter name: what gives each element a scale of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.group import Member


class Squares:
    """Equal on all ranks, since results are. Tensors are views of the buffers that the kernels work in; all float32,
    flat, memory order."""

    def __init__(self) -> None:
        self._means: dict[str, Tensor] = {}

    def allocate(self, members: Sequence[Member], device: torch.device) -> Tensor:
        """One flat buffer for the members, one behind the other, with what is known of them so far."""
        flat = torch.zeros(sum(member.numel for member in members), device=device)
        for member, view in zip(members, flat.split([member.numel for member in members]), strict=True):
            if member.name in self._means:
                view.copy_(self._means[member.name])
            self._means[member.name] = view
        return flat

    def state(self) -> dict[str, Tensor]:
        """Copies, to be saved."""
        return {name: mean.clone() for name, mean in self._means.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes what :meth:`state` gave.

        Raises:
            ValueError: it is damaged; nothing was taken.
        """
        for name, mean in state.items():
            if not isinstance(mean, Tensor) or mean.dtype != torch.float32 or mean.dim() != 1:
                raise ValueError(
                    f"The compressor's state is damaged: the mean squares of {name} must be a flat float32 tensor; "
                    "load what state_dict() returned."
                )
        self._means = {name: mean.clone() for name, mean in state.items()}
