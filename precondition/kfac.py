"""K-FAC and DP-KFAC."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer

from dear import _ddp
from dear.preconditioning import Site, Team
from precondition import _checks
from precondition._factors import message_size, pack, unpack, widest
from precondition._layers import Layer, find_layers, name_left_out
from precondition._loss_scale import loss_scale
from precondition._owners import Factors, OwnersBinding, States
from precondition._plain import Registered
from precondition._ranks import Ranks
from precondition._solvers import SOLVERS


class KroneckerFactored(Registered):
    """What :class:`KFAC` and :class:`DPKFAC` have in common: everything but whose samples the factors are of."""

    updates = ("owned",)  # see dear.preconditioning

    def __init__(
        self,
        damping: float = 0.003,
        factor_decay: float = 0.95,
        update_every: int = 1,
        inverse_every: int = 10,
        kl_clip: float | None = 0.001,
        solver: Literal["cholesky", "eigen"] = "cholesky",
        *,
        grad_scaler: Any = None,
        **unknown: Any,
    ) -> None:
        _checks.check_known(type(self), unknown)
        _checks.check_positive(damping=damping, **({} if kl_clip is None else {"kl_clip": kl_clip}))
        _checks.check_decay(factor_decay)
        _checks.check_scaler(grad_scaler)
        _checks.check_interval(update_every=update_every, inverse_every=inverse_every)
        if solver not in SOLVERS:
            raise ValueError(f'solver must be "cholesky" or "eigen", not {solver!r}.')
        self.damping, self.factor_decay, self.kl_clip = damping, factor_decay, kl_clip
        self.update_every, self.inverse_every, self.solver = update_every, inverse_every, SOLVERS[solver](damping)
        self.steps = 0
        self._scaler = grad_scaler
        self._layers: list[Layer] = []
        self._binding: OwnersBinding | None = None
        self._loaded: States = {}  # by layer, until the owners are known

    # --- what differs ---

    @abstractmethod
    def captured(self, layers: Sequence[Layer], owned: Sequence[Layer]) -> Sequence[Layer]:
        """The layers that this rank captures, which owns some of them."""

    @abstractmethod
    def for_owners(self, taken: Factors, by_rank: Sequence[Sequence[Layer]], ranks: Ranks) -> Factors:
        """The new factors of this rank's own layers, from those that it took. Collective."""

    # --- for dear.attach and precondition.register ---

    def check_new(self, model: DDP, optimizers: Sequence[Optimizer], caller: str) -> dict[str, Any]:
        """See :class:`dear.preconditioning.Preconditioner`."""
        if self._binding is not None:
            raise RuntimeError("This preconditioner serves a model already, and keeps its state: make another one.")
        trained = set(_ddp.reduced_parameters(model))
        held = {param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]}
        found = find_layers(model.module, trained, embeddings=True)
        self._layers = [layer for layer in found if held.intersection(layer.params)]
        if not self._layers:
            raise ValueError(
                f"The model has no layer that {type(self).__name__} can precondition: it serves trained nn.Linear, "
                "nn.Conv1d, nn.Conv2d, nn.Conv3d and small nn.Embedding modules."
            )
        _checks.check_groups(self._layers, optimizers)
        self._check_loaded()
        if model.process_group.rank() == 0:
            name_left_out(model.module, self._layers, trained)
        options = {f"the preconditioner's {name}": value for name, value in self.options().items()}
        return {
            "the preconditioner": type(self).__name__,
            **options,
            "the preconditioner's steps": self.steps,
            "the preconditioned layers": [layer.name for layer in self._layers],
        }

    def options(self) -> dict[str, Any]:
        """What it was made with."""
        names = ("damping", "factor_decay", "update_every", "inverse_every", "kl_clip")
        return {name: getattr(self, name) for name in names} | {"solver": self.solver.name}

    def teams(self, model: DDP) -> list[Team]:
        """See :class:`dear.preconditioning.Preconditioner`."""
        return self.teams_of(self._layers)

    def teams_of(self, layers: Sequence[Layer]) -> list[Team]:
        """The layers and what they cost a step, in multiplications: two products with the gradient, and a share of two
        inversions."""
        teams = []
        for layer in layers:
            a, g = layer.sizes
            cost = layer.blocks * (a * g * (a + g) + (a**3 + g**3) / self.inverse_every)
            teams.append(Team(layer.name, layer.params, cost))
        return teams

    def bind_to_schedule(self, site: Site) -> OwnersBinding:
        """See :class:`dear.preconditioning.Preconditioner`."""
        self._binding = OwnersBinding(self, site, self._layers, self._loaded)
        return self._binding

    def released(self, states: States) -> None:
        """The model lets go. This rank's own part of the state is kept."""
        self._loaded, self._binding = states, None

    def grad_scale(self) -> Tensor | None:
        """What the loss was multiplied by, without asking the device."""
        # In single precision, whatever the weights': a scale may be more than half precision holds.
        like = torch.empty(0, device=self._layers[0].weight.device) if self._binding is not None else None
        return None if like is None else loss_scale(self._scaler, like)

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Steps, options, and by layer the running factors and what was solved of them, of all layers on every rank.
        Collective, once the preconditioner serves a model."""
        states = self._loaded
        if self._binding is not None and self._binding.knows_owners:
            states = self._binding.states()
        return {"preconditioner": type(self).__name__, "options": self.options(), "steps": self.steps, "layers": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave, at any world size, between two steps; every rank must load the same.

        Raises:
            ValueError: it is not a state of such a preconditioner, or of another model; nothing has been changed.
        """
        kind = type(self).__name__
        if not isinstance(state, dict) or not {"preconditioner", "options", "steps", "layers"} <= state.keys():
            raise ValueError("This is not a preconditioner's state: pass what its state_dict() returned.")
        if state["preconditioner"] != kind or state["options"].get("solver") != self.solver.name:
            raise ValueError(
                f'This is the state of {state["preconditioner"]} with solver="{state["options"].get("solver")}", not '
                f'of {kind} with solver="{self.solver.name}": load it into the same kind.'
            )
        former, self._loaded = self._loaded, dict(state["layers"])
        try:
            self._check_loaded()
        except ValueError:
            self._loaded = former
            raise
        self.steps = int(state["steps"])
        if self._binding is not None:
            self._binding.load(self._loaded)

    def _check_loaded(self) -> None:
        for layer in self._layers:
            state = self._loaded.get(layer.name)
            shapes = [(layer.blocks, size, size) for size in layer.sizes]
            if state is not None and [tuple(state[name].shape) for name in ("inputs", "outputs")] != shapes:
                raise ValueError(
                    f"The preconditioner's state is of another model: the layer {layer.name or 'at its root'} had "
                    "other sizes; load a state saved with this model."
                )


class DPKFAC(KroneckerFactored):
    """K-FAC whose Kronecker factors never travel: a layer's owner alone captures its inputs and output gradients, from
    its own mini-batch, inverts, and preconditions the averaged gradient.

    Under :func:`dear.attach` a step then sends the bytes of an all-reduce, as without a preconditioner, and one number
    for ``kl_clip``. On plain DDP (:func:`precondition.register`) owners send what they have preconditioned.

    Serves ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` with their subclasses, and ``nn.Embedding``
    with at most four times as many rows as columns; other layers, and those that share a parameter, are left to the
    optimizer. Of passes in eval mode nothing is learnt. The loss is taken to be a mean over the first dimension of the
    layers' inputs.

    Args:
        damping: γ, added to the curvature: larger is nearer to the gradient.
        factor_decay: weight of the past in the running averages of the factors.
        update_every: steps from one capture to the next.
        inverse_every: steps from one inversion to the next.
        kl_clip: κ, the largest size of an update in the curvature's norm: all preconditioned gradients are multiplied
            by min(1, √(κ / Σ lr² ⟨P, ∇⟩)). None: never.
        solver: ``"cholesky"`` inverts each factor with its share of the damping; ``"eigen"`` adds γ to the products of
            their eigenvalues, which is exact, and costs more.
        grad_scaler: the ``torch.amp.GradScaler`` that scales the loss, if one does: gradients of outputs are scaled,
            too.

    Source: Zhang et al., "Scalable K-FAC Training for Deep Neural Networks with Distributed Preconditioning", 2022.
    """

    def captured(self, layers: Sequence[Layer], owned: Sequence[Layer]) -> Sequence[Layer]:
        return owned

    def for_owners(self, taken: Factors, by_rank: Sequence[Sequence[Layer]], ranks: Ranks) -> Factors:
        return {layer: taken[layer] for layer in by_rank[ranks.rank] if layer in taken}


class KFAC(KroneckerFactored):
    """K-FAC with the Kronecker factors averaged over all ranks: every rank captures every layer, and all factors go to
    the layers' owners in one message a step. Otherwise as :class:`DPKFAC`, with the same arguments.

    Source: Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", 2015;
    Pauloski et al., "Convolutional Neural Network Training with Distributed K-FAC", 2020.
    """

    def captured(self, layers: Sequence[Layer], owned: Sequence[Layer]) -> Sequence[Layer]:
        return layers

    def for_owners(self, taken: Factors, by_rank: Sequence[Sequence[Layer]], ranks: Ranks) -> Factors:
        """A layer's factors travel with their count: a rank that did not run it adds nothing."""
        if ranks.world == 1:
            return taken
        layers = [layer for own in by_rank for layer in own]
        flat = self._layers[0].weight.new_zeros(sum(map(message_size, layers)), dtype=widest(layers))
        for layer, part in zip(layers, flat.split([message_size(layer) for layer in layers]), strict=True):
            if layer in taken:
                pack(*taken[layer], part)
        sizes = [sum(map(message_size, own)) for own in by_rank]
        mine, own = ranks.mean_at_owners(flat, sizes, "the factors"), by_rank[ranks.rank]
        parts = mine.split([message_size(layer) for layer in own])
        return {layer: unpack(layer, part) for layer, part in zip(own, parts, strict=True)}
