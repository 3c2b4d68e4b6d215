"""Checkpoints by ``torch.distributed.checkpoint`` (DCP): model, optimizer and engine as one ``Stateful``."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer

from dear.engine import Engine

__all__ = ["TrainingState"]


class TrainingState(Stateful):
    """What DCP saves and loads of a training run under :func:`dear.attach`, at any world size.

    ``dcp.save({"training": TrainingState(model, optimizer, engine)}, checkpoint_id=path)``, on every rank, and
    ``dcp.load`` with the same. Model and optimizer are saved by parameter name, so that plain DDP, or FSDP, can load
    them by ``set_state_dict``. Every rank gathers all of the optimizer's state;
    :mod:`dear.integrations.dcp_sharded` does not.
    """

    def __init__(self, model: DDP, optimizer: Optimizer | Sequence[Optimizer], engine: Engine) -> None:
        self._model, self._engine = model, engine
        self._optimizer = optimizer if isinstance(optimizer, Optimizer) else list(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Collective: every rank must call it, as DCP does."""
        with self._engine.full_state():
            model, optimizer = get_state_dict(self._model, self._optimizer)
        rest = io.BytesIO()
        torch.save(self._engine.state_dict(optimizer=False), rest)
        return {"model": model, "optimizer": optimizer, "engine": rest.getvalue()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Every rank must call it alike."""
        # First, since it may change who has which part of the optimizer's state.
        self._engine.load_state_dict(torch.load(io.BytesIO(state_dict["engine"]), weights_only=True))
        with self._engine.full_state():
            set_state_dict(
                self._model,
                self._optimizer,
                model_state_dict=state_dict["model"],
                optim_state_dict=state_dict["optimizer"],
            )
