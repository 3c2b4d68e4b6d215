"""Parameters in flat buffers: moved there where their memory is not shared, copied to and from them otherwise.

See Note [Moving storage] in csrc/schedule/parameters.h.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dear import _C
from dear._context import StepContext, ordinary
from dear._layout import Layout, Place
from dear._pending import unguarded


class FlatParameters:
    """Where the parameters of a layout are: in the flat buffers, or, if others hold their memory, where they were, and
    then their values are copied."""

    def __init__(self, layout: Layout) -> None:
        """Moves every parameter that can be moved."""
        self._layout = layout
        self._params = [place.param for place in layout.places]
        self._copied: list[Place] = []
        self._addresses: list[int] = []
        self._move(range(len(layout.full)))

    def _move(self, buckets: Iterable[int]) -> None:
        layout = self._layout
        self._copied = [place for place in self._copied if place.bucket not in buckets]
        for place in (place for bucket in buckets for place in layout.in_bucket(bucket)):
            if _C.can_move(place.param):
                _C.move_storage(place.param, layout.full[place.bucket][place.start : place.stop])
            else:
                self._copied.append(place)
        self._addresses = [place.param.data_ptr() for place in layout.places]

    def moved(self) -> set[int]:
        """The buckets of parameters that were given another place (``param.data = ...``, ``to()``)."""
        pairs = zip(self._layout.places, self._addresses, strict=True)
        return {place.bucket for place, address in pairs if place.param.data_ptr() != address}

    def move_back(self, buckets: set[int]) -> None:
        """Gives these buckets new flat buffers, since others may hold parts of the old ones, and fills them with the
        values of their parameters."""
        for bucket in buckets:
            self._layout.full[bucket] = torch.empty_like(self._layout.full[bucket])
        self._move(buckets)

    @property
    def has_aliases(self) -> bool:
        """Whether anybody but the parameters themselves holds their memory."""
        return bool(self._copied) or _C.has_aliases(self._params)

    def copy_in(self) -> None:
        """Copies the values of parameters that could not be moved to the flat buffers."""
        for place in self._copied:
            place.view(self._layout.full[place.bucket]).copy_(place.param.detach())

    def copy_out(self, places: Iterable[Place]) -> None:
        """Copies the flat buffers' values to those of the places whose parameters could not be moved."""
        if self._copied:
            copied = {id(place) for place in self._copied}
            with ordinary(StepContext(self._layout.full[0].device, grad=False)):
                for place in places:
                    if id(place) in copied:
                        unguarded([place.param])[0].copy_(place.view(self._layout.full[place.bucket]))
