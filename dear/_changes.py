"""What a rank's script has done to gradients that stay in shards, as one number.

Plain DDP's replicas part where a script changes gradients otherwise on each rank. Here each rank changes its own part
of the averages, so all get the same mixture, which no comparison of parameters could see: ranks compare this number
(:mod:`dear._replicas`).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch

from dear import _C


class Changes:
    """Adds up from the time when the library was put under the model, in whatever order parameters come: in a set it is
    another one on each rank."""

    def __init__(self) -> None:
        self.total = 0

    def note(self, *what: Any) -> None:
        """Something was done; ``what`` says it in words and numbers, the same on ranks that do the same."""
        self.total = (self.total + zlib.crc32(repr(what).encode())) % (1 << 32)

    def note_at(self, at: Sequence[int], *what: Any) -> None:
        """The same, done to the gradients of these places."""
        self.note(len(at), sum(at), sum(index * index for index in at), *what)

    def note_gradients(self, grads: Sequence[torch.Tensor]) -> None:
        """These were put in the place of averages. On a device they are counted alone: nobody waits for it."""
        plain = all(grad.is_cpu and grad.layout == torch.strided for grad in grads)
        self.note(_C.checksums(grads) if plain else len(grads))


def number(value: Any) -> Any:
    """A factor or a bound. A tensor is not read: on a device nobody waits for it, and one that ranks have computed by
    themselves, as from a norm, may be rounded otherwise on another processor."""
    return "a tensor" if isinstance(value, torch.Tensor) else value
