"""What the public classes of Eva and its like share: settings, which layers they serve, and their state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer

from dear import _ddp
from dear.preconditioning import Param, Site, Team
from precondition import _checks, _layers
from precondition._plain import Registered
from precondition.eva_binding import RankOneBinding
from precondition.eva_host import HostMeans
from precondition.eva_means import Means, Running, Shaped, lies_by_rows
from precondition.eva_rank_one import RankOneStep, Settings


class RankOnePreconditioner(Registered):
    """A preconditioner whose curvature has rank one. It serves one model at a time."""

    updates: Sequence[str] = ("sharded", "owned")  # see dear.preconditioning
    step_kind: ClassVar[type[RankOneStep]]
    captures: ClassVar[bool] = True  # whether it wants to know inputs
    with_rows: ClassVar[bool] = True  # whether it keeps a vector of each layer's outputs

    def __init__(
        self,
        damping: float,
        factor_decay: float,
        kl_clip: float | None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        _checks.check_scaler(grad_scaler)
        self.settings = Settings(damping, factor_decay, kl_clip)
        self._scaler = grad_scaler
        self._running: Running | None = None  # while it serves a model
        self._loaded: dict[str, Any] = {}  # by layer, while it serves none

    def served(self, root: nn.Module, trained: set[Param]) -> list[Shaped]:
        """What it preconditions below ``root``."""
        return [layer for layer in _layers.find_layers(root, trained) if lies_by_rows(layer)]

    def name_left_out(self, root: nn.Module, served: Sequence[Shaped], trained: set[Param]) -> None:
        """Names in the log what stays the optimizer's."""
        _layers.name_left_out(root, [layer for layer in served if isinstance(layer, _layers.Layer)], trained)

    def options(self) -> dict[str, Any]:
        """What it was made with."""
        return asdict(self.settings)

    # --- for dear.attach and precondition.register ---

    def check_new(self, model: DDP, optimizers: Sequence[Optimizer], caller: str) -> dict[str, Any]:
        """See :class:`dear.preconditioning.Preconditioner`."""
        if self._running is not None:
            raise RuntimeError("This preconditioner serves a model already, and keeps its state: make another one.")
        trained = set(_ddp.reduced_parameters(model))
        layers, kind = self.served(model.module, trained), type(self).__name__
        if not layers:
            raise ValueError(f"{caller} found no layer that precondition.{kind} serves: leave preconditioner out.")
        _checks.check_groups(layers, optimizers)
        self._new_running(layers, torch.device("cpu"))
        if model.process_group.rank() == 0:
            self.name_left_out(model.module, layers, trained)
        options = {f"the preconditioner's {name}": value for name, value in self.options().items()}
        names = [layer.name for layer in layers]
        known = sorted(self._loaded)
        return {"the preconditioner": kind, **options, "the preconditioned layers": names, "those with a state": known}

    def teams(self, model: DDP) -> Sequence[Team]:
        """None: a rank may have any part of a gradient."""
        return ()

    def bind_to_schedule(self, site: Site) -> RankOneBinding:
        """See :class:`dear.preconditioning.Preconditioner`."""
        layers = self.served(site.model, set(site.params))
        running = self._running = self._new_running(layers, site.device)
        captured = [layer for layer in layers if isinstance(layer, _layers.Layer)]  # all, where inputs are wanted
        kind = HostMeans if site.device.type == "cpu" else Means
        means = kind(captured, running.vectors, self.with_rows, self._scaler) if self.captures else None
        return RankOneBinding(self, site, layers, running, means)

    def _new_running(self, layers: Sequence[Shaped], device: torch.device) -> Running:
        running = Running(layers, self.with_rows, device)
        running.load_state_dict(self._loaded)
        return running

    def new_step(self, running: Running) -> RankOneStep:
        """The next step, of gradients that have been reduced."""
        return self.step_kind(running, self.settings)

    def released(self) -> None:
        """The model lets go; what was learnt is kept."""
        if self._running is not None:
            self._loaded, self._running = self._running.state_dict(), None

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """The running means by the layer's name, ``{"layers": {name: {"a": ..., "b": ...}}}``, and of which kind of
        preconditioner they are; equal on every rank."""
        layers = self._loaded if self._running is None else self._running.state_dict()
        return {"preconditioner": type(self).__name__, "layers": layers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave, before or after there is a model; every rank must load the same.

        Raises:
            ValueError: it is not a state of such a preconditioner, or of another model; nothing has been changed.
        """
        if not isinstance(state, dict) or not {"preconditioner", "layers"} <= state.keys():
            raise ValueError("This is not a preconditioner's state: pass what its state_dict() returned.")
        if state["preconditioner"] != type(self).__name__:
            raise ValueError(
                f"This is the state of {state['preconditioner']}, not of {type(self).__name__}: load it into the same "
                "kind."
            )
        if self._running is None:
            self._loaded = dict(state["layers"])
        else:
            self._running.load_state_dict(state["layers"])
