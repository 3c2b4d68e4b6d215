"""Top-k: the largest elements, by owner."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from compress import ops
from compress.compressor import Compressor
from compress.group import Group
from dear import _C

#: One element of this many is sampled.
SAMPLED = 16
#: With fewer sampled elements above the threshold than this, the density would stray: those groups select exactly.
ENOUGH = 1000


class TopK(Compressor):
    """Each rank sends the k = density * n largest elements of g + e to the owners of their shards; each owner adds
    them up with its own error, and sends the k / P largest of its shard to all.

        rank:   c = g + e;  send S(c), the k largest of c;  e <- c - S(c)
        owner:  s = (sum of the ranks' S(c)) / P + ê;  send S(s), its share of k;  ê <- s - S(s)

    So a rank sends about 2 k entries, of 8 bytes, whatever the number of ranks. Slots for the owners are of fixed
    length, so that no length depends on data; what does not fit stays in the error.

    Args:
        density: k / n, in (0, 1]; smaller compresses more. n is the number of elements in a bucket.
        selection: ``"exact"`` finds the k-th largest of all elements; ``"sampled"`` that of a sixteenth of them, which
            costs little, and selects about k: within 10% of it. Small groups and owners select exactly.
        slack: capacity of the slots, in multiples of what they hold when the selected elements spread evenly.
        Others: see :class:`compress.Compressor`.

    Source: Stich et al., "Sparsified SGD with Memory", NeurIPS 2018; compressing again at the owner: Tang et al.,
    "DoubleSqueeze", ICML 2019.
    """

    exchange: ClassVar[Literal["sum", "owners", "gather"]] = "owners"

    def __init__(
        self,
        density: float = 0.01,
        *,
        selection: Literal["exact", "sampled"] = "exact",
        slack: float = 1.25,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 0 < density <= 1:
            raise ValueError(f"density must be in (0, 1], the share of elements to send, not {density!r}.")
        if selection not in ("exact", "sampled"):
            raise ValueError(f'selection must be "exact" or "sampled", not {selection!r}.')
        if not slack >= 1:
            raise ValueError(f"slack must be 1 or more, not {slack!r}.")
        self.density, self.selection, self.slack = float(density), selection, float(slack)

    def options(self) -> dict[str, Any]:
        return {"density": self.density, "selection": self.selection, "slack": self.slack}

    def ratio(self, group: Group) -> float:
        return group.numel / (group.world * ops.topk_slot_numel(self._capacity(group)))

    def native(self, group: Group) -> _C.Codec:
        begin, end = self.owned_range(group)
        k = self._k(group)
        return _C.TopKCodec(
            device=group.device,
            rank=group.rank,
            world=group.world,
            numel=group.numel,
            shard=self.shard_numel(group),
            owned=end - begin,
            k=k,
            owner_k=max(1, k // self._owners(group)),
            capacity=self._capacity(group),
            sampled=self._samples(group),
            error=group.error,
            owner_error=group.owner_error,
        )

    def _samples(self, group: Group) -> bool:
        return self.selection == "sampled" and self._k(group) >= ENOUGH * SAMPLED

    def _k(self, group: Group) -> int:
        return max(1, round(self.density * group.numel))

    def _capacity(self, group: Group) -> int:
        """Entries in one owner's slot."""
        evenly = self._k(group) / self._owners(group)
        return min(self.shard_numel(group), group.numel, math.ceil(self.slack * evenly))

    def _owners(self, group: Group) -> int:
        """Ranks whose shard is not empty."""
        return -(-group.numel // self.shard_numel(group))

    def _slot(self, group: Group) -> int:
        return ops.topk_slot_numel(self._capacity(group))
