"""What a rank's script has done to gradients that stay in shards, as one number.

Plain DDP's replicas part where a script changes gradients otherwise on each rank. Here each rank changes its own part
of the averages, so all get the same mixture, which no comparison of parameters could see: ranks compare this number
(:mod:`dear._replicas`).
"""

from __future__ import annotations

import zlib
from typing import Any

import torch

from dear import _C


class Changes:
    """Counts up from the time when the library was put under the model."""

    def __init__(self) -> None:
        self.total = 0

    def note(self, *what: Any) -> None:
        """Something was done; ``what`` says it in words and numbers, the same on ranks that do the same."""
        self.total = zlib.crc32(repr(what).encode(), self.total)

    def note_gradients(self, grads: list[torch.Tensor]) -> None:
        """These were put in the place of averages. On a device they are counted alone: nobody waits for it."""
        self.note(_C.checksums(grads) if all(grad.is_cpu for grad in grads) else len(grads))


def number(value: Any) -> Any:
    """A factor or a bound as a number; on a device nobody waits for it, so it is not read there."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.item() if value.is_cpu else "on a device"
