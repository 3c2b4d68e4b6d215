"""What the schedule needs of a compressor: the interface that :mod:`compress` implements, and nothing of its inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from dear import _C
from dear._nodes import Nodes

PRESETS = ("exact", "safe", "fast")  #: of compress.preset(), to name the one that was meant


@dataclass(frozen=True)
class Site:
    """Where a compressor is put to work."""

    model: DDP
    optimizer: torch.optim.Optimizer
    device: torch.device
    lanes: Sequence[_C.Lane]  # the reduce-scatter lane and the all-gather lane
    algorithm: str
    scheduler: _C.Scheduler
    synchronize: Callable[[], None]  # waits until nothing is in flight
    nodes: Nodes | None  # between which alone it is to work


class Binding(Protocol):
    """A compressor at work under the schedule: its groups by bucket, and what becomes of a non-finite gradient."""

    @property
    def compressor(self) -> Compressor | None:
        """Whose binding this is; None where nothing is compressed."""

    def exchanges(self, buckets: list[_C.Bucket], full: list[Tensor]) -> list[list[_C.TwoPhaseExchange]]:
        """By bucket, the exchanges from its local gradients to its flat results. Collective."""

    def note_unused(self, unused: set[torch.nn.Parameter]) -> None:
        """A backward pass has ended in which no rank has used these parameters."""

    def validate(self) -> None:
        """Decides, once a step and before its results are used, what becomes of it.

        Raises:
            RuntimeError: some rank's gradient was not finite, and the user wants an error; the same on every rank.
        """

    def arrived(self, bucket: int) -> None:
        """The bucket's results stand, in a step that was validated."""

    def stats_of_last_step(self) -> dict[str, Any]:
        """Of the last step that has surely finished, without waiting: what was computed, in ms."""

    def release(self) -> None:
        """Gives the compressor back, with its state."""


class Compressor(Protocol):
    """What :func:`dear.attach` takes as ``compressor``."""

    usual_ratio: float  # by how much gradients shrink, roughly

    def check_new(self, model: DDP, caller: str) -> dict[str, Any]:
        """Refuses what cannot become the compressor of this model; returns what must be equal on every rank."""

    def bind_to_schedule(self, site: Site) -> Binding:
        """Puts the compressor to work. Collective."""

    def state_dict(self, gather: bool = False) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


class Uncompressed:
    """The binding of no compressor: gradients go as they are."""

    compressor = None

    def exchanges(self, buckets: list[_C.Bucket], full: list[Tensor]) -> list[list[_C.TwoPhaseExchange]]:
        return []

    def note_unused(self, unused: set[torch.nn.Parameter]) -> None: ...

    def validate(self) -> None: ...

    def arrived(self, bucket: int) -> None: ...

    def stats_of_last_step(self) -> dict[str, Any]:
        return {}

    def release(self) -> None: ...


def check_kind(thing: Any, caller: str) -> None:
    """Refuses what is no compressor.

    Raises:
        TypeError: one sentence says what it is instead.
    """
    if isinstance(thing, str):
        name = thing if thing in PRESETS else "safe"
        raise TypeError(
            f'{caller} needs a compressor, not the string {thing!r}: make one, such as compress.preset("{name}").'
        )
    if hasattr(thing, "bind_to_schedule"):
        if hasattr(thing, "teams"):
            name = getattr(thing, "__name__", type(thing).__name__)
            raise TypeError(
                f"{caller} needs a compressor, and {name} is a preconditioner: pass it to dear.attach() as "
                "preconditioner=, or to precondition.register()."
            )
        if not isinstance(thing, type):
            return
        name = f"compress.{thing.__name__}" if thing.__module__.startswith("compress.") else thing.__name__
        raise TypeError(f"{name} is a class; pass an instance, such as {name}().")
    raise TypeError(f"{caller} needs a compressor, such as compress.ACPSGD(), not {type(thing).__name__}.")
