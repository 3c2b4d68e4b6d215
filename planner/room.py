"""Memory in the trials of ``auto``.

Note [Out of memory]
A rank that runs out of memory while parts are built is in the middle of exchanges, and cannot ask the others to go
back. So before a setting is built each rank takes the memory that it will need, for a moment, and all hear who could
not: the setting is not tried then, on any rank. What is needed is what can be counted, which may be too little. Then
the error surfaces where memory was asked for, often in the user's own backward pass. It is left to go its way, since
the other ranks wait in that pass; it is only told what auto was about.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from types import TracebackType

import torch

from dear.choosing import Steering

from .deciding import Way
from .instruments import Instruments
from .profiling import IN_PARTS

SIGNS = ("out of memory", "can't allocate memory", "Cannot allocate memory")  # in the words of torch's allocators

log = logging.getLogger("dear")


class Room:
    """Of one search: what its settings need beyond the one that it begins with."""

    def __init__(self, steering: Steering, instruments: Instruments) -> None:
        """At a step boundary, before the first trial."""
        self._steering, self._instruments = steering, instruments
        self._in_steps = instruments.in_steps(steering.ground.device)
        self._fitted: set[Way] = set()  # in this search

    def check(self, way: Way) -> None:
        """See Note [Out of memory]. Collective.

        Raises:
            ValueError: a rank has no room for it, or could not find out; on every rank.
        """
        steering = self._steering
        if way in self._fitted:
            return
        try:
            building, staying = needs(steering, way)
            self._instruments.reserve(steering.ground.device, max(building, staying + self._in_steps))
            wrong = ""
        except Exception as error:  # whatever it is, the others wait to hear of it
            what = "has no room for it" if ran_out(error) else "could not find out whether it has room for it"
            wrong = f"{what}: {type(error).__name__}: {error}".partition("\n")[0].rstrip(".")
        everyone = steering.everyones(wrong, "whether there is room for a setting")
        failed = next((rank for rank, why in enumerate(everyone) if why), None)
        if failed is not None:
            raise ValueError(f"rank {failed} {everyone[failed]}")
        self._fitted.add(way)


def needs(steering: Steering, way: Way) -> tuple[int, int]:
    """Bytes that this rank holds beyond what it holds now: while the way's parts are built, and as long as they stay.

    Both sets of buffers are there while it changes, and the optimizer's whole state where it has been in parts.
    """
    ground, engine = steering.ground, steering.engine
    model = sum(param.nbytes for param in ground.model.module.parameters() if param.requires_grad)
    own = engine.stats()["optimizer_state_bytes"]
    missing = own * (ground.group.size() - 1) if engine.update in IN_PARTS else 0
    error = model if way.codec.keeps_error else 0
    return missing + model, (0 if way.update in IN_PARTS else missing) + error


def ran_out(error: BaseException | None) -> bool:
    """Whether memory was what failed, of a device or of the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def sentence(way: Way) -> str:
    return (
        f'compressor="auto" ran out of memory in a trial of {way}: give update= and compressor= that fit, or '
        "compressor=compress.auto(plan=...) with a plan that was chosen where there was more."
    )


@contextlib.contextmanager
def told(tried: Callable[[], Way | None]) -> Iterator[None]:
    """Inside, an error by which the program or the engine's context ends for want of memory is told what was tried.

    tried: what training would not be at without ``auto``; None where it is what the user began with.
    """
    former, under_way = sys.excepthook, True

    def tell(error: BaseException | None) -> None:
        way = tried()
        if way is None or error is None or not ran_out(error):
            return
        said = sentence(way)
        if not hasattr(error, "add_note"):  # Python 3.10
            log.error(said)
        elif said not in getattr(error, "__notes__", ()):
            error.add_note(said)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if under_way:
            tell(error)
        former(kind, error, trace)

    sys.excepthook = hook
    try:
        yield
    except GeneratorExit as left:  # the engine is let go of while an error is handled
        tell(left.__context__)
        raise
    finally:
        under_way = False
        if sys.excepthook is hook:  # else somebody's own calls this one
            sys.excepthook = former
