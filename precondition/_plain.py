"""A preconditioner on plain DDP: between ``backward()`` and ``optimizer.step()`` it changes ``.grad``."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer

from dear import _ddp, _refusals, preconditioning
from dear._agree import agree, meet_on
from dear._compiled import uncompiled
from dear._optimizer import unwrapped
from dear.collectives import choose_algorithm, group_timeout, make_lane
from dear.preconditioning import Binding, Param, Preconditioner, Run, Site
from precondition._loss_scale import check_unscaled

PLAIN = "plain"  # what Site.update says here
PATIENCE = 20  # backward passes without a step() before somebody is told


class Registered:
    """What every preconditioner has in common: :meth:`step` on plain DDP."""

    plain: Plain | None = None
    _scaler: Any = None  # what multiplies the loss, if anything does and it was told

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Its options, by name."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.options().items())})"

    def step(self) -> None:
        """Preconditions ``.grad``, on plain DDP: call it on every rank between ``backward()`` and ``optimizer.step()``,
        after gradients were unscaled and clipped. Nothing happens where no parameter has a gradient, and nothing is
        learnt where no optimizer's gradients are finite, since GradScaler skips such a step.

        Raises:
            RuntimeError: :func:`precondition.register` was not called, or ``grad_scaler`` has not unscaled gradients.
        """
        if self.plain is None:
            raise RuntimeError(
                "preconditioner.step() needs a model: call precondition.register(model, optimizer, preconditioner) "
                "first; under dear.attach(..., preconditioner=) optimizer.step() does its work."
            )
        self.plain.step(self._scaler)

    def release(self) -> None:
        """Takes the preconditioner off the model it was registered for; what it has learnt stays in it."""
        if self.plain is not None:
            self.plain.release()
            self.plain = None


class Plain:
    """A registered preconditioner at work."""

    def __init__(
        self, model: DDP, params: Sequence[Param], optimizers: Sequence[Sequence[Any]], binding: Binding
    ) -> None:
        """``optimizers``: each by torch's object, and by the one that the user gave, which may be a wrapper."""
        self._model, self._params, self._optimizers, self.binding = model, params, optimizers, binding
        self._reminder = Reminder(model)
        setattr(model, preconditioning.REGISTERED, type(binding.preconditioner).__name__)

    def release(self) -> None:
        """See :meth:`Registered.release`."""
        self._reminder.end()
        delattr(self._model, preconditioning.REGISTERED)
        self.binding.release()

    @torch.no_grad()
    def step(self, scaler: Any = None) -> None:
        """See :meth:`Registered.step`."""
        self._reminder.end()
        used = [param for param in self._params if param.grad is not None]
        if not used:
            return
        grads = self._by_optimizer(used)
        check_unscaled(scaler, [self._optimizers[number] for number in grads])
        # As under dear.attach(), where a step that GradScaler skips is never asked for. Averaged gradients are equal on
        # all ranks, and so is the answer.
        if grads and not _any_finite(list(grads.values())):
            self.binding.dropped()
            return
        self.binding.backward_ended()
        self.binding.begin()
        runs, other = [], []
        for param in used:
            grad = given = param.grad
            assert grad is not None and given is not None
            if grad.stride() != param.stride():
                grad = torch.empty_like(param).copy_(given)
                other.append((given, grad))
            runs.append(Run(param, 0, param.numel(), grad))
        self.binding.precondition(runs)
        self.binding.end()
        for given, grad in other:
            given.copy_(grad)

    def _by_optimizer(self, used: Sequence[Param]) -> dict[int, list[Tensor]]:
        """The gradients that each optimizer will use, by its number, of those that will use any."""
        grads = {param: param.grad for param in used if param.grad is not None}
        found = {}
        for number, (optimizer, *_) in enumerate(self._optimizers):
            mine = [grads[each] for group in optimizer.param_groups for each in group["params"] if each in grads]
            if mine:
                found[number] = mine
        return found


def _any_finite(lists: Sequence[Sequence[Tensor]]) -> bool:
    """Whether any of these lists has finite elements alone. The device is asked once."""
    flags = []
    for tensors in lists:
        batches: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for each in tensors:
            if each.numel():
                batches.setdefault((each.dtype, each.device), []).append(each)
        # Of the largest element, which does not overflow as a sum would.
        largest = [torch.stack(torch._foreach_norm(batch, float("inf"))) for batch in batches.values()]
        finite = [each.isfinite().all().to(lists[0][0].device) for each in largest]
        flags.append(torch.stack(finite).all() if finite else torch.ones((), dtype=torch.bool))
    return bool(torch.stack([each.to(flags[0].device) for each in flags]).any())


class Reminder:
    """Warns once where many backward passes go by after :func:`register` and nobody calls ``step()``."""

    def __init__(self, model: DDP) -> None:
        self._passes = 0
        self._handle = model.register_forward_pre_hook(uncompiled(self._count))

    def end(self) -> None:
        """Counts no more."""
        self._handle.remove()

    def _count(self, model: DDP, inputs: Any) -> None:
        # Each such pass has a backward pass, whose gradients DDP waits for. The optimizer's steps are not counted:
        # under dear.attach() a hook of theirs would make the whole update one. Where gradients are zeroed in place,
        # nothing tells a step from accumulation, and nobody is warned.
        if not (model.training and torch.is_grad_enabled() and model.require_backward_grad_sync):
            return
        if any(param.grad is not None for param in model.parameters()):  # gradients are added up for one step
            return
        if self._passes == PATIENCE:
            self.end()
            warnings.warn(
                f"preconditioner.step() was not called in {PATIENCE} backward passes since precondition.register(), so "
                "the optimizer uses plain gradients: call it between backward() and optimizer.step(), or "
                "preconditioner.release().",
                stacklevel=2,
            )
        self._passes += 1


def register(model: DDP, optimizer: Optimizer | Sequence[Optimizer], preconditioner: Preconditioner) -> None:
    """Puts a preconditioner to work on plain DDP; ``preconditioner.step()`` then changes ``.grad``. Collective.

    Args:
        model: the DDP module.
        optimizer: what updates its parameters, or several: learning rates are read there.
        preconditioner: such as ``precondition.DPKFAC()``; it serves one model.

    Where no ``step()`` comes within 20 backward passes, one warning says so.

    Raises:
        TypeError, ValueError, RuntimeError: it cannot serve this model, or ranks disagree; one sentence says why, on
            every rank, and nothing has been changed.
    """
    caller = "precondition.register()"
    _refusals.check_kind(model, caller)
    given = optimizer if isinstance(optimizer, (list, tuple)) else (optimizer,)
    optimizers = [unwrapped(one) for one in given]

    def look() -> dict[str, Any]:
        for one in optimizers:
            _refusals.check_optimizer(one, caller)
        preconditioning.check_kind(preconditioner, caller)
        preconditioning.check_free(model)
        return preconditioner.check_new(model, optimizers, caller)

    meet_on(model.process_group, model.device)
    agree(model.process_group, look, "every rank must call precondition.register() with the same arguments")
    params, group = _ddp.reduced_parameters(model), model.process_group
    device = params[0].device
    algorithm = choose_algorithm(group, device, None)
    timeout = group_timeout(group, device)
    reduce, gather = (make_lane(group, f"preconditioner {name}", algorithm, timeout) for name in ("reduce", "gather"))
    site = Site(model.module, params, optimizers, group, device, PLAIN, reduce, gather, algorithm)
    known_as = list(zip(optimizers, given, strict=True))
    binding = preconditioner.bind_to_schedule(site)
    preconditioner.plain = Plain(model, params, known_as, binding)  # type: ignore[attr-defined]
