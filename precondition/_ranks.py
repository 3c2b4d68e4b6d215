"""Between the ranks: what goes to layers' owners, and what comes from them. One message each time, whatever the number
of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dear import _C
from dear._objects import all_gather_object
from dear.preconditioning import Site


class Ranks:
    """The ranks of a site, and its lanes."""

    def __init__(self, site: Site) -> None:
        self._reduce, self._gather, self._device = site.reduce_lane, site.gather_lane, site.device
        self.rank, self.world = site.group.rank(), site.group.size()
        self.bytes_sent = 0  #: by this rank

    def _ownership(self, sizes: Sequence[int]) -> _C.Ownership:
        """A flat tensor in which each rank owns so many elements, one rank's after another's."""
        starts = [sum(sizes[:rank]) for rank in range(self.world)]
        ranges = [[(start, start + size)] if size else [] for start, size in zip(starts, sizes, strict=True)]
        return _C.Ownership(sum(sizes), ranges)

    def mean_at_owners(self, flat: Tensor, sizes: Sequence[int], label: str) -> Tensor:
        """The mean over the ranks of what this rank owns of a flat tensor."""
        chunk = flat.new_empty(sizes[self.rank])
        parts, owners = [(flat, chunk)], [self._ownership(sizes)]
        self._reduce.submit(_C.Phase.reduce_scatter, _C.Reduction.average, parts, label, owners).wait()
        self.bytes_sent += (flat.numel() - sizes[self.rank]) * flat.element_size()
        return chunk

    def complete(self, flat: Tensor, sizes: Sequence[int], label: str) -> None:
        """Completes a flat tensor of which each rank has what it owns."""
        parts, owners = [(flat, flat[:0])], [self._ownership(sizes)]
        self._gather.submit(_C.Phase.all_gather, _C.Reduction.sum, parts, label, owners).wait()
        self.bytes_sent += (flat.numel() - sizes[(self.rank + 1) % self.world]) * flat.element_size()

    def sum(self, value: Tensor, label: str) -> Tensor:
        """The sum of one number of each rank, with the same bits on every rank."""
        everyone = value.new_empty(self.world)
        everyone[self.rank] = value
        self.complete(everyone, [1] * self.world, label)
        return everyone.sum()

    def objects(self, value: Any, label: str) -> list[Any]:
        """What every rank passed."""
        return all_gather_object(self._gather, value, label, self._device)
