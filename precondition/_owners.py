"""A preconditioner whose layers each have an owner, at work: under the schedule, and on plain DDP.

Note [Owners of layers]
A layer's owner alone has its factors, and preconditions its averaged gradient. Under the schedule the gradient is
reduced to its owner anyway, who updates the parameters, too. On plain DDP every rank has it, and the owner sends the
others what becomes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dear.preconditioning import Param, Run, Site, Team
from precondition._capture import Capture
from precondition._factors import Running, Statistics, factor_dtype, widest
from precondition._layers import Layer
from precondition._plain import PLAIN
from precondition._ranks import Ranks
from precondition._solvers import Solver

States = dict[str, dict[str, Tensor]]  # by layer, by name
Factors = dict[Layer, tuple[Tensor, Tensor, Tensor]]  # A, G, and 0 where they do not count


class Method(Protocol):
    """What the binding needs of its preconditioner."""

    steps: int
    update_every: int
    inverse_every: int
    factor_decay: float
    kl_clip: float | None
    solver: Solver

    def teams_of(self, layers: Sequence[Layer]) -> Sequence[Team]:
        """The layers and their costs."""

    def captured(self, layers: Sequence[Layer], owned: Sequence[Layer]) -> Sequence[Layer]:
        """The layers that this rank captures, which owns some of them."""

    def for_owners(self, taken: Factors, by_rank: Sequence[Sequence[Layer]], ranks: Ranks) -> Factors:
        """The new factors of this rank's own layers, from those that it took. Collective."""

    def grad_scale(self) -> Tensor | None:
        """What the loss was multiplied by."""

    def released(self, states: States) -> None:
        """The binding lets go of the model, and leaves this rank's own part of the state."""


class OwnersBinding:
    """See :class:`dear.preconditioning.Binding`."""

    def __init__(self, preconditioner: Any, site: Site, layers: Sequence[Layer], states: States) -> None:
        """``states``: of layers, which were loaded before."""
        self.preconditioner, self._states = preconditioner, states
        self._method: Method = preconditioner
        self.teams = self._method.teams_of(layers)
        self._layers, self._optimizers, self._plain = layers, site.optimizers, site.update == PLAIN
        self._of_param = {param: layer for layer in layers for param in layer.params}
        self._ranks = Ranks(site)
        self._statistics = Statistics()
        self._capture = Capture(self._statistics.add)
        self._capture.enabled = self._method.steps % self._method.update_every == 0
        self._running: dict[Layer, Running] = {}  # of this rank's layers
        self._owner: dict[Layer, int] = {}
        self._grads: dict[Layer, dict[Param, Tensor]] = {}  # of this step
        self._changed: dict[Layer, Tensor] = {}  # and this rank's, preconditioned
        self._rates: dict[Param, Any] = {}  # learning rates
        self._joined: dict[tuple[Layer, ...], tuple[Tensor, ...]] = {}  # solutions of layers of one shape
        self._total = torch.zeros((), dtype=widest(layers), device=site.device)  # Σ lr² ⟨P, ∇⟩ of this rank's layers
        self._capture.watch(layers)  # until the owners are known
        if self._plain:
            self.assigned(_longest_first(self.teams, self._ranks.world))

    # --- owners ---

    @property
    def knows_owners(self) -> bool:
        """Whether :meth:`assigned` was called; the same on every rank."""
        return bool(self._owner)

    def _by_rank(self) -> list[list[Layer]]:
        """The ranks' layers."""
        ranks = range(self._ranks.world)
        return [[layer for layer in self._layers if self._owner[layer] == rank] for rank in ranks]

    def assigned(self, owner: dict[Param, int]) -> None:
        found = {layer: owner[layer.weight] for layer in self._layers}
        if found == self._owner:
            return
        states = self.states() if self._owner else self._states
        self._owner, self._states = found, {}
        own = self._by_rank()[self._ranks.rank]
        self._running = {layer: Running(layer) for layer in own}
        self._load(states)
        captured = self._method.captured(self._layers, own)
        self._capture.watch(captured)
        self._statistics.keep(captured)

    # --- a step ---

    def backward_ended(self) -> None: ...

    def dropped(self) -> None:
        self._statistics.keep(())

    def begin(self) -> None:
        method = self._method
        if method.steps % method.update_every == 0:
            taken = self._statistics.take(self._layers, method.grad_scale())
            for layer, (inputs, outputs, counts) in method.for_owners(taken, self._by_rank(), self._ranks).items():
                self._running[layer].update(inputs, outputs, counts, method.factor_decay)
        solves = method.steps % method.inverse_every == 0
        self._solve([layer for layer, own in self._running.items() if solves or not own.solution])
        method.steps += 1
        self._capture.enabled = method.steps % method.update_every == 0
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        self._rates = {param: group.get("lr", 1.0) for group in groups for param in group["params"]}
        self._grads, self._changed = {}, {}
        self._total.zero_()

    def _solve(self, layers: Sequence[Layer]) -> None:
        each = [self._running[layer] for layer in layers]
        if not each:
            return
        self._joined.clear()
        solutions = self._method.solver.solve([own.inputs for own in each], [own.outputs for own in each])
        for own, solution in zip(each, solutions, strict=True):
            own.solution = solution
            own.ready.copy_(own.seen)

    def precondition(self, runs: Sequence[Run]) -> None:
        complete: list[Layer] = []
        for run in runs:
            layer = self._of_param.get(run.param)
            if layer is not None:
                grads = self._grads.setdefault(layer, {})
                grads[run.param] = run.grad
                if len(grads) == len(layer.params) and layer in self._running:
                    complete.append(layer)
        batches: dict[tuple[Any, ...], list[Layer]] = {}
        for layer in complete:
            kind = (layer.weight.dtype, *layer.sizes, id(self._rates[layer.weight]))
            batches.setdefault(kind, []).append(layer)
        for batch in batches.values():
            self._precondition(batch)

    def _precondition(self, layers: list[Layer]) -> None:
        """Those of one shape and learning rate, as one batch."""
        grads = torch.cat([self._gradient(layer) for layer in layers])
        found = self._method.solver.apply(self._solution(layers), grads)
        each = [layer.blocks for layer in layers]
        rate = self._rates[layers[0].weight]
        for layer, result, grad in zip(layers, found.split(each), grads.split(each), strict=True):
            sound = (self._running[layer].ready > 0) & result.sum().isfinite()
            result = torch.where(sound, result, grad)
            self._changed[layer] = result
            self._total += rate * rate * torch.where(sound, (result * grad).sum(), 0.0)
            if not self._plain:
                self._write(layer, result)

    def _gradient(self, layer: Layer) -> Tensor:
        grads = self._grads[layer]
        bias = None if layer.bias is None else grads[layer.bias]
        return layer.matrix(grads[layer.weight], bias).to(factor_dtype(layer))

    def _solution(self, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
        """The layers' solutions joined; theirs are views of it from now on."""
        key = tuple(layers)
        if len(layers) == 1:
            return self._running[layers[0]].solution
        if key not in self._joined:
            solutions = [self._running[layer].solution for layer in layers]
            self._joined[key] = tuple(map(torch.cat, zip(*solutions, strict=True)))
            parts = [joined.split([layer.blocks for layer in layers]) for joined in self._joined[key]]
            for layer, own in zip(layers, zip(*parts, strict=True), strict=True):
                self._running[layer].solution = own
        return self._joined[key]

    def _write(self, layer: Layer, matrix: Tensor) -> None:
        for param, part in zip(layer.params, layer.split(matrix), strict=True):
            self._grads[layer][param].copy_(part)

    def end(self) -> set[Param]:
        method, total = self._method, self._total
        if self._plain:
            total = self._send_to_all()
        elif method.kl_clip is not None and self._ranks.world > 1:
            total = self._ranks.sum(total, "the size of the preconditioned update")
        if method.kl_clip is not None:
            scale = (method.kl_clip / total).sqrt().clamp(max=1.0)
            scale = torch.where(scale.isfinite(), scale, 1.0)
            changed = self._grads if self._plain else self._changed
            grads = [grad for layer in changed for grad in self._grads[layer].values()]
            if grads:  # a rank may own no layer
                torch._foreach_mul_(grads, scale)
        self._grads, self._changed = {}, {}
        return set(self._of_param)

    def _send_to_all(self) -> Tensor:
        """Every rank's preconditioned gradients and its part of the sum, in one message; returns the whole sum."""
        mine = self._ranks.rank
        if self._ranks.world == 1:
            for layer, matrix in self._changed.items():
                self._write(layer, matrix)
            return self._total
        by_rank = self._by_rank()
        sizes = [sum(_numel(layer) for layer in layers) + 1 for layers in by_rank]
        flat = self._total.new_zeros(sum(sizes))
        chunks = zip(flat.split(sizes), by_rank, strict=True)
        parts = [chunk.split([*map(_numel, layers), 1]) for chunk, layers in chunks]
        for part, layer in zip(parts[mine], by_rank[mine], strict=False):
            if layer in self._changed:
                part.copy_(self._changed[layer].reshape(-1))
        parts[mine][-1].copy_(self._total)
        self._ranks.complete(flat, sizes, "preconditioned gradients")
        for own, layers in zip(parts, by_rank, strict=True):
            for part, layer in zip(own, layers, strict=False):
                if layer in self._grads:
                    self._write(layer, part.view(layer.blocks, layer.out_size, layer.in_size))
        return torch.cat([own[-1] for own in parts]).sum()

    # --- state ---

    def states(self) -> States:
        """Of every layer, from its owner. Collective."""
        mine = {
            layer.name: {name: tensor.detach().cpu().clone() for name, tensor in own.tensors().items()}
            for layer, own in self._running.items()
        }
        everyone = self._ranks.objects(mine, "the preconditioner's state")
        return {name: state for one in everyone for name, state in one.items()}

    def load(self, states: States) -> None:
        """Takes them, between two steps; where the owners are not known yet, :meth:`assigned` will."""
        self._statistics.keep(())
        self._capture.enabled = self._method.steps % self._method.update_every == 0
        self._states = states
        if self._owner:
            self._load(states)

    def _load(self, states: States) -> None:
        self._joined.clear()
        for layer, own in self._running.items():
            if layer.name in states:
                own.load(states[layer.name])

    # --- looking on ---

    def stats(self) -> dict[str, Any]:
        further, dropped = self._method.solver.damped_further, self._statistics.dropped
        held = [tensor for own in self._running.values() for tensor in own.tensors().values()]
        return {
            "preconditioner_bytes_sent": self._ranks.bytes_sent,
            "preconditioner_bytes_held": sum(tensor.nbytes for tensor in held),
            "preconditioned_layers": len(self._layers),
            "factors_dropped": 0 if dropped is None else int(dropped),
            "factors_damped_further": 0 if further is None else int(further),
        }

    def release(self) -> None:
        self._capture.release()
        self._method.released({layer.name: own.tensors() for layer, own in self._running.items()})


def _numel(layer: Layer) -> int:
    return layer.blocks * layer.out_size * layer.in_size


def _longest_first(teams: Sequence[Team], world: int) -> dict[Param, int]:
    """The owner of each team's parameters: the costliest first, each to the rank that has the least to do."""
    load = [0.0] * world
    owner: dict[Param, int] = {}
    for team in sorted(teams, key=lambda team: -team.cost):
        rank = min(range(world), key=lambda rank: (load[rank], rank))
        load[rank] += team.cost
        owner.update(dict.fromkeys(team.params, rank))
    return owner
