"""What a backend's own collective raises says nothing of ranks: a lane of ours is asked who has ended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch.distributed as dist

from dear import _C

# For the news to come, once the backend has failed. A lane may wait for its peers an eighth longer, at most 10 s.
_PATIENCE = timedelta(seconds=5)
_LONGER = timedelta(seconds=10)


def is_of_backend(error: RuntimeError) -> bool:
    """Whether a backend has raised it."""
    # HACK: gloo raises what any check of torch raises; its file name stands in the text, but not of each timeout.
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _named(lane: _C.Lane, error: RuntimeError, phase: str, label: str, what: str) -> RuntimeError:
    """The error to raise in place of a backend's: who has ended, or one that says ``what`` has failed."""
    found = lane.investigate(phase, label, _PATIENCE + _LONGER)
    if found is None:
        reason = str(error).partition("\n")[0]
        found = f"{what}, and no peer is known to have ended: look for one that has stalled ({reason})."
    return RuntimeError(found)


@contextlib.contextmanager
def naming(
    lane: _C.Lane, phase: str, label: str, what: str, of_backend: Callable[[RuntimeError], bool] = is_of_backend
) -> Iterator[None]:
    """Inside, errors that are ``of_backend`` become those of :func:`_named`."""
    try:
        yield
    except RuntimeError as error:
        if of_backend(error):
            raise _named(lane, error, phase, label, what) from error
        raise
