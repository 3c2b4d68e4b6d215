"""What a compressor asks to be exchanged, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dear import _C
from dear.collectives import shard_range

Kind = Literal["reduce_scatter", "all_gather", "all_to_all"]
_PHASES: dict[Kind, _C.Phase] = {
    "reduce_scatter": _C.Phase.reduce_scatter,
    "all_gather": _C.Phase.all_gather,
    "all_to_all": _C.Phase.all_to_all,
}
_KINDS = {phase: kind for kind, phase in _PHASES.items()}


@dataclass(frozen=True)
class Exchange:
    """One collective on a contiguous tensor.

    ``"reduce_scatter"``: this rank's :func:`dear.shard_range` of ``tensor`` becomes the mean over the ranks.
    ``"all_gather"``: ``tensor`` is completed from every rank's range.
    ``"all_to_all"``: row r of ``tensor`` [ranks, n] goes to rank r; ``received`` [ranks, n] is what came. It can come
    first in a step only.
    """

    kind: Kind
    tensor: Tensor
    received: Tensor | None = None

    def bytes_sent(self, world: int) -> int:
        """What one rank must send."""
        return self.tensor.numel() * self.tensor.element_size() * (world - 1) // world

    def message(self, rank: int, world: int) -> tuple[_C.Phase, Tensor, Tensor | None]:
        """The same for the native pipeline: the phase, the whole and this rank's part, both flat."""
        flat = self.tensor.view(-1)
        if self.kind == "all_to_all":
            assert self.received is not None
            return _PHASES[self.kind], flat, self.received.view(-1)
        begin, end = shard_range(flat.numel(), world, rank)
        return _PHASES[self.kind], flat, flat[begin:end] if self.kind == "reduce_scatter" else None

    @classmethod
    def of(cls, message: _C.Message, world: int) -> Exchange:
        """What a native codec asks for; a reduce-scatter's part is within its whole."""
        kind = _KINDS[message.phase]
        if kind != "all_to_all":
            return cls(kind, message.full)
        return cls(kind, message.full.view(world, -1), message.shard.view(world, -1))


Steps = Iterator[Exchange]
