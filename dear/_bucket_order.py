"""The order of the buckets, which a run that goes on with a saved state must have from its first step on.

See Note [One layout] in :mod:`dear._schedule`.
"""

from __future__ import annotations

from dear import _C, _ddp
from dear._attached import Attached, Param
from dear._layout import read_places


class BucketOrder:
    """The names of the parameters in the order of the buckets: as it is, and as a loaded state asks for it."""

    def __init__(self, attached: Attached) -> None:
        self._attached = attached
        self.wanted: list[str] = []  # of a loaded state, until a layout has it

    def names(self) -> list[str]:
        """The order of the buckets, or that which the next layout shall have; empty before the first backward pass."""
        layout = self._attached.layout
        return self.wanted or (self._names_in(layout.buckets) if layout is not None else [])

    def load(self, names: list[str]) -> None:
        """The next layout shall have this order, if it can; a layout that has another one is given up. Every rank must
        call it alike."""
        self.wanted = names

    def asks_to_leave(self, buckets: list[_C.Bucket]) -> bool:
        """Whether the buckets of the present layout can have the wanted order, and have another one. Where they cannot,
        or have it, nothing is wanted any more."""
        if not self._differs(buckets):
            self.wanted = []
        return bool(self.wanted)

    def take(self, buckets: list[_C.Bucket]) -> list[Param] | None:
        """The parameters in the wanted order, if these buckets of a new layout can have it, and have another one.
        Nothing is wanted any more."""
        names = self.wanted if self._differs(buckets) else []
        self.wanted = []
        by_name = {self._attached.names[param]: param for param in self._attached.params}
        return [by_name[name] for name in names] or None

    def _differs(self, buckets: list[_C.Bucket]) -> bool:
        """Buckets can have an order that may differ between runs, and that is of this model's parameters."""
        attached = self._attached
        mine = sorted(attached.names[param] for param in attached.params)
        possible = not _ddp.tracks_unused(attached.model) and sorted(self.wanted) == mine
        return possible and self.wanted != self._names_in(buckets)

    def _names_in(self, buckets: list[_C.Bucket]) -> list[str]:
        return [self._attached.names[place.param] for place in read_places(buckets, self._attached.params)]
