"""Top-k: the largest elements, by owner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from compress import ops, saved
from compress.compressor import Compressor
from compress.group import Group, compressed_here
from compress.stepwise import Stepwise
from dear import _C

#: A sample must have so many elements above the threshold: the count then strays by 2%.
ENOUGH = 2500
#: At least one element of this many is sampled.
LARGEST_STRETCH = 16


class TopK(Compressor):
    """Each rank sends the k = density * n largest elements of g + e to the owners of their shards; each owner adds
    them up with its own error, and sends the k / P largest of its shard to all.

        rank:   c = g + e;  send S(c), the k largest of c;  e <- c - S(c)
        owner:  s = (sum of the ranks' S(c)) / P + ê;  send S(s), its share of k;  ê <- s - S(s)

    So a rank sends about 2 k entries, of 8 bytes, whatever the number of ranks. Slots for the owners are of fixed
    length, so that no length depends on data; what does not fit stays in the error.

    Args:
        density: k / n, in (0, 1], or a list of (step, density), such as ``[(0, 0.1), (1000, 0.01)]``; smaller
            compresses more. n is the number of elements in a bucket.
        selection: ``"exact"`` finds the k-th largest of all elements every step. ``"threshold"`` keeps a threshold for
            as long as it selects about k of a sample, a sixteenth of the elements or more, another one every step; it
            costs little, and selects k to within 10%. Small groups and owners select exactly.
        slack: capacity of the slots, in multiples of what they hold when the selected elements spread evenly.
        Others: see :class:`compress.Compressor`.

    Source: Stich et al., "Sparsified SGD with Memory", NeurIPS 2018; compressing again at the owner: Tang et al.,
    "DoubleSqueeze", ICML 2019.
    """

    exchange: ClassVar[Literal["sum", "owners", "gather"]] = "owners"

    def __init__(
        self,
        density: float | Sequence[tuple[int, float]] = 0.01,
        *,
        selection: Literal["exact", "threshold"] = "exact",
        slack: float = 1.25,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._thresholds: dict[tuple[str, ...], list[float]] = {}  # loaded, by group; one for each density
        self.density = density
        if selection not in ("exact", "threshold"):
            raise ValueError(f'selection must be "exact" or "threshold", not {selection!r}.')
        if not 1 <= slack < math.inf:
            raise ValueError(f"slack must be 1 or more, and finite, not {slack!r}.")
        self.selection, self.slack = selection, float(slack)

    @property
    def density(self) -> float | Sequence[tuple[int, float]]:
        """As it was given. It may be assigned between two backward passes, on every rank alike: the next one counts."""
        return self._density

    @density.setter
    def density(self, density: float | Sequence[tuple[int, float]]) -> None:
        stages: Stepwise[float] = Stepwise(density, "density", _check_density)

        def apply() -> None:
            self._density, self.stages = density, stages

        saved.change(self, "density", apply)
        self._thresholds.clear()  # they were found for other densities

    def options(self) -> dict[str, Any]:
        return {"density": self.stages.said, "selection": self.selection, "slack": self.slack}

    def ratio(self, group: Group) -> float:
        largest = max(density for _, density in self.stages.values)
        return group.numel / (group.world * ops.topk_slot_numel(self._capacity(group, largest)))

    def natives(self, group: Group) -> list[tuple[int, _C.Codec]]:
        codecs = [self._codec(group, density) for _, density in self.stages.values]
        for codec, threshold in zip(codecs, self._thresholds.pop(group.names, []), strict=False):
            codec.threshold.fill_(threshold)
        group.private = codecs
        return [(begin, codec) for (begin, _), codec in zip(self.stages.values, codecs, strict=True)]

    def _codec(self, group: Group, density: float) -> _C.TopKCodec:
        k = self._k(group, density)
        return _C.TopKCodec(
            numel=group.numel,
            shard=self.shard_numel(group),
            k=k,
            owner_k=max(1, k // self._owners(group)),
            capacity=self._capacity(group, density),
            stretch=self._stretch(k),
            **self.codec_arguments(group),
        )

    def own_state(self) -> dict[tuple[str, ...], list[float]]:
        kept = {
            group.names: [float(codec.threshold) for codec in group.private]
            for group in compressed_here(self.groups.values())
            if group.private is not None
        }
        return self._thresholds | kept

    def load_own_state(self, state: dict[tuple[str, ...], list[float]]) -> None:
        sound = isinstance(state, dict) and all(
            isinstance(names, tuple) and isinstance(own, list) and all(isinstance(each, float) for each in own)
            for names, own in state.items()
        )
        if not sound:
            raise ValueError(
                'The compressor\'s state is damaged: "own" must map names of parameters to thresholds; load what '
                "state_dict() returned."
            )
        self._thresholds = dict(state)

    def forget_own_state(self) -> None:
        self._thresholds.clear()

    def _stretch(self, k: int) -> int:
        """One run of so many is sampled; 0 where the sample would be too small."""
        stretch = LARGEST_STRETCH
        while stretch > 1 and k < ENOUGH * stretch:
            stretch //= 2
        return stretch if self.selection == "threshold" and stretch > 1 else 0

    def _k(self, group: Group, density: float) -> int:
        return max(1, round(density * group.numel))

    def _capacity(self, group: Group, density: float) -> int:
        """Entries in one owner's slot."""
        evenly = self._k(group, density) / self._owners(group)
        return min(self.shard_numel(group), group.numel, math.ceil(self.slack * evenly))

    def _owners(self, group: Group) -> int:
        """Ranks whose shard is not empty."""
        return -(-group.numel // self.shard_numel(group))


def _check_density(density: Any) -> float:
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], the share of elements to send, not {density!r}.")
    return float(density)
