"""DDP's own collectives in a forward pass: a peer that dies meanwhile is named, as in this library's.

DDP broadcasts the order of its buckets once, when it rebuilds them, and buffers in every forward pass. When its backend
fails there, the error says nothing of ranks. So a lane of ours is asked who has ended. Whoever has stalled is found by
an exchange of ours, which every rank makes before DDP's. The one before the rebuild is waited for; that before the
broadcast of buffers goes round beside it, on the lane's thread, and costs the forward pass no wait.
"""

from __future__ import annotations

import contextlib
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from dear import _C, _ddp
from dear._backend_errors import is_of_backend, naming
from dear._compiled import uncompiled
from dear._objects import all_gather_object
from dear.collectives import shard_range

__all__ = ["OwnCalls"]


class OwnCalls:
    """Guards the forward passes of a DDP module whose reducer is new."""

    def __init__(self, model: DDP, lane: _C.Lane, device: torch.device) -> None:
        """``lane``: moves all-gathers of tensors on ``device``, and is idle whenever a forward pass begins, or busy
        alike on all ranks."""
        self._model, self._lane, self._device = model, lane, device
        # With a static graph DDP chooses another time for it, which cannot be told.
        self._rebuilds = not (model.static_graph or model.find_unused_parameters)

        # On a device an exchange more is work of the host's, which nothing hides.
        arrivals = None if isinstance(lane, _C.NativeLane) or device.type != "cpu" else _Arrivals(lane)

        @uncompiled
        def pre_forward(self: DDP, *inputs: Any, **kwargs: Any) -> Any:
            if arrivals is not None and torch.is_grad_enabled() and _ddp.broadcasts_buffers(self):
                arrivals.announce()
            with _naming(lane):
                return type(self)._pre_forward(self, *inputs, **kwargs)

        # A method, so that a copy of the module has one of its own.
        model.__dict__["_pre_forward"] = types.MethodType(pre_forward, model)

    def before_forward(self, delivered: bool) -> None:
        """Called before every forward pass; ``delivered``: the reducer has reduced gradients."""
        if delivered and self._rebuilds and torch.is_grad_enabled():
            self.before_rebuild()

    def before_rebuild(self) -> None:
        """Called where DDP is about to rebuild its buckets: whoever does not come is named."""
        self._rebuilds = False
        all_gather_object(self._lane, None, "the ranks that come to DDP's bucket rebuild", self._device)

    @contextlib.contextmanager
    def rebuild(self) -> Iterator[None]:
        """Inside, DDP rebuilds its buckets: whoever does not come, or ends meanwhile, is named."""
        self.before_rebuild()
        with _naming(self._lane):
            yield

    def release(self) -> None:
        """Takes the guard off."""
        self._model.__dict__.pop("_pre_forward", None)


class _Arrivals:
    """What tells the lane that this rank has come to DDP's broadcast of buffers; nobody waits for it there."""

    def __init__(self, lane: _C.Lane) -> None:
        self._lane = lane
        self._full = torch.zeros(lane.world, dtype=torch.uint8)
        self._last: _C.Exchange | None = None

    def announce(self) -> None:
        """Called on every rank before DDP's broadcast.

        Raises:
            RuntimeError: a peer has ended or stalled since the last one.
        """
        if self._last is not None:
            self._last.wait()
        begin, end = shard_range(self._lane.world, self._lane.world, self._lane.rank)
        parts = [(self._full, self._full[begin:end])]
        label = "the ranks that come to DDP's broadcast of buffers"
        self._last = self._lane.submit(_C.Phase.all_gather, _C.Reduction.sum, parts, label)


def _is_of_backend(error: RuntimeError) -> bool:
    if "INTERNAL ASSERT" in str(error):  # of DDP, as where the model has lost its last buffer
        return False
    frames = traceback.extract_tb(error.__traceback__)
    # A signal's handler may raise anywhere, as one that reads a parameter whose update is under way.
    ours = bool(frames) and Path(frames[-1].filename).parent == Path(__file__).parent
    return is_of_backend(error) or (not ours and any(frame.name == "_sync_buffers" for frame in frames))


def _naming(lane: _C.Lane) -> contextlib.AbstractContextManager[None]:
    what = f"DDP's own broadcast failed in a forward pass of rank {lane.rank}"
    return naming(lane, "broadcast", "DDP's buckets or buffers", what, _is_of_backend)
