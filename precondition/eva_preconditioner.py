"""What the public classes of Eva and its like share: settings, which layers they serve, and their state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from dear.preconditioning import Param, Site, Team
from precondition import _layers
from precondition._plain import Registered
from precondition.eva_binding import RankOneBinding
from precondition.eva_means import Means, Running, Shaped, lies_by_rows, matrix_of
from precondition.eva_parts import Vectors
from precondition.eva_rank_one import RankOneStep, Settings


class RankOnePreconditioner(Registered):
    """A preconditioner whose curvature has rank one. It serves one model at a time."""

    updates: Sequence[str] = ("sharded", "owned")
    step_kind: ClassVar[type[RankOneStep]]
    captures: ClassVar[bool] = True  # whether it wants to know inputs
    with_rows: ClassVar[bool] = True  # whether it keeps a vector of each layer's outputs

    def __init__(
        self,
        damping: float,
        factor_decay: float,
        kl_clip: float | None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.settings = Settings(damping, factor_decay, kl_clip)
        self._scaler = scaler
        self._running: Running | None = None
        self._loaded: dict[str, Any] | None = None  # a state that came before there was a model

    def served(self, root: nn.Module, trained: set[Param]) -> list[Shaped]:
        """What it preconditions below ``root``."""
        return [layer for layer in _layers.find_layers(root, trained) if lies_by_rows(layer)]

    def check_new(self, model: nn.Module, optimizers: Sequence[Optimizer], caller: str) -> dict[str, Any]:
        """Refuses what cannot be preconditioned; returns what must be equal on every rank.

        Raises:
            ValueError: there is no layer that can be, or a layer's weight and bias are of different optimizer groups.
        """
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        group_of = {param: number for number, group in enumerate(groups) for param in group["params"]}
        layers = self.served(model, {param for param in model.parameters() if param.requires_grad})
        kind = type(self).__name__
        if not layers:
            raise ValueError(f"{caller} found no layer that precondition.{kind} serves: leave preconditioner out.")
        for layer in layers:
            if layer.bias is not None and group_of.get(layer.weight) != group_of.get(layer.bias):
                raise ValueError(
                    f"The weight and the bias of {layer.name} are in different groups of the optimizer, and {kind} "
                    "changes them together: put them into one group."
                )
        settings = ", ".join(f"{name}={value}" for name, value in asdict(self.settings).items())
        return {"the preconditioner": f"{kind}({settings}) of {', '.join(layer.name for layer in layers)}"}

    def teams(self, model: nn.Module) -> Sequence[Team]:
        """None: a rank may have any part of a gradient."""
        return ()

    def bind_to_schedule(self, site: Site) -> RankOneBinding:
        """Puts it to work on a model."""
        layers = self.served(site.model, set(site.params))
        self.name_left_out(site.model, layers, set(site.params))
        wide = any(layer.weight.dtype == torch.float64 for layer in layers)
        dtype = torch.float64 if wide else torch.float32
        vectors = Vectors([matrix_of(layer) for layer in layers], dtype, site.device)
        before = self.state_dict()
        running = self._running = Running(layers, vectors, self.with_rows)
        captured = [layer for layer in layers if isinstance(layer, _layers.Layer)]  # all, where inputs are wanted
        means = Means(captured, vectors, self.with_rows, self._scaler) if self.captures else None
        self.load_state_dict(before)

        def new_step() -> RankOneStep:
            return self.step_kind(vectors, running, self.settings)

        return RankOneBinding(self, site, layers, vectors, running, new_step, means)

    def name_left_out(self, root: nn.Module, layers: Sequence[Shaped], trained: set[Param]) -> None:
        """Names in the log what stays the optimizer's."""
        _layers.name_left_out(root, [layer for layer in layers if isinstance(layer, _layers.Layer)], trained)

    def state_dict(self) -> dict[str, Any]:
        """The running means by the layer's name: ``{"layers": {name: {"a": ..., "b": ...}}}``, equal on every rank."""
        if self._running is None:
            return self._loaded or {"layers": {}}
        return {"layers": self._running.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave, before or after there is a model.

        Raises:
            ValueError: it is of another model.
        """
        if self._running is None:
            self._loaded = state
        else:
            self._running.load_state_dict(state["layers"])
