"""DDP's own collectives in a forward pass: a peer that dies meanwhile is named, as in this library's.

DDP broadcasts the order of its buckets once, when it rebuilds them, and buffers in every forward pass. When its backend
fails there, the error says nothing of ranks. So a lane of ours is asked who has ended; and before the broadcast that
every rank must make, an exchange of ours finds whoever has stalled.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from dear import _C
from dear._compiled import uncompiled
from dear._objects import all_gather_object

__all__ = ["OwnCalls"]

_PATIENCE = timedelta(seconds=5)  # for the news to come, once DDP's backend has failed


class OwnCalls:
    """Guards the forward passes of a DDP module whose reducer is new."""

    def __init__(self, model: DDP, lane: _C.Lane, device: torch.device) -> None:
        """``lane``: moves all-gathers of tensors on ``device``, and is idle whenever a forward pass begins, or busy
        alike on all ranks."""
        self._model, self._lane, self._device = model, lane, device
        # With a static graph DDP chooses another time for it, which cannot be told.
        self._rebuilds = not (model.static_graph or model.find_unused_parameters)

        @uncompiled
        def pre_forward(self: DDP, *inputs: Any, **kwargs: Any) -> Any:
            try:
                return type(self)._pre_forward(self, *inputs, **kwargs)
            except RuntimeError as error:
                if _is_of_backend(error):
                    raise _named(lane, error) from error
                raise

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
        try:
            yield
        except RuntimeError as error:
            if _is_of_backend(error):
                raise _named(self._lane, error) from error
            raise

    def release(self) -> None:
        """Takes the guard off."""
        self._model.__dict__.pop("_pre_forward", None)


def _is_of_backend(error: RuntimeError) -> bool:
    # HACK: gloo raises what any check of torch raises; its file name stands in the text.
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _named(lane: _C.Lane, error: RuntimeError) -> RuntimeError:
    found = lane.investigate("broadcast", "DDP's buckets or buffers", _PATIENCE)
    if found is None:
        reason = str(error).partition("\n")[0]
        found = (
            f"DDP's own broadcast failed in a forward pass of rank {lane.rank}, and no peer is known to have ended: "
            f"look for one that has stalled ({reason})."
        )
    return RuntimeError(found)
