"""The first pass of a new reducer under ``static_graph=True``: DDP learns the graph from it, once and for all.

A pass that it cannot be learnt from would leave gradients that nobody reduces. Where a hook of ours is on the reducer,
it is called at the end of the pass and checks then; plain DDP tells nobody, so a :class:`FirstPass` stands beside it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from dear._compiled import uncompiled
from dear._open_pass import refuse_backward


def check_begins(model: DDP, caller: str) -> None:
    """Refuses a first pass that begins so that a new reducer could not learn a static graph from it.

    Raises:
        RuntimeError: it runs under ``no_sync()``.
    """
    if model.static_graph and not model.require_backward_grad_sync:
        raise RuntimeError(
            f"With static_graph=True the first pass after {caller} must not run under model.no_sync(), where DDP's new "
            "reducer cannot learn the graph: run one ordinary pass first."
        )


def check_learns(model: DDP, params: Iterable[torch.nn.Parameter], caller: str) -> None:
    """Refuses a first pass of a static graph that has left no gradient: ``torch.autograd.grad()`` ran in it, as for a
    gradient penalty, at whose end DDP reduces what there is, and takes the pass for learnt.

    Raises:
        RuntimeError: on every rank, out of that call.
    """
    if model.static_graph and all(param.grad is None for param in params):
        raise RuntimeError(_not_learnt(caller))


def _not_learnt(caller: str) -> str:
    return (
        f"With static_graph=True the first pass after {caller} must not call torch.autograd.grad() before "
        "backward(), since DDP learns the graph from it and would not reduce the gradients: run one ordinary pass "
        "first."
    )


class FirstPass:
    """What both functions above do, beside the reducer that a plain DDP module has now, of which no hook tells.

    It is to be told of every forward pass, and is over with the first gradient that is reduced, or with the reducer.
    """

    def __init__(self, model: DDP | None, caller: str) -> None:
        """``caller`` made the reducer. None for a copy of a module, which has a reducer of its own."""
        self._caller = caller
        self._reducer: Any = weakref.ref(model.reducer) if model is not None and model.static_graph else _nothing
        self._waits: list[Any] | None = None  # for a first gradient, from the first forward pass on

    def before_forward(self, model: DDP) -> bool:
        """Returns whether it is over.

        Raises:
            RuntimeError: the graph could not be learnt from this pass, or from the one before.
        """
        if self._waits == [] or model.reducer is not self._reducer():
            self.end()
            return True
        if not torch.is_grad_enabled():
            return False
        check_begins(model, self._caller)
        if model._static_graph_delay_allreduce_enqueued:  # a backward pass has run, and no gradient has come
            raise RuntimeError(_not_learnt(self._caller))
        if self._waits is None:
            self._waits = refuse_backward(model, model.module.parameters(), _not_learnt(self._caller))
        return False

    def end(self) -> None:
        """Takes everything off the parameters."""
        for handle in self._waits or ():
            handle.remove()
        self._waits, self._reducer = None, _nothing

    def __reduce__(self) -> Any:
        return type(self), (None, self._caller)


class Watch(FirstPass):
    """As a forward pre-hook of the module's, which takes itself off. Not to be put on in a forward pass, whose hooks
    torch has looked up already."""

    def __init__(self, model: DDP | None, caller: str) -> None:
        super().__init__(model, caller)
        self._handle = model.register_forward_pre_hook(self) if model is not None and model.static_graph else None

    @uncompiled
    def __call__(self, model: DDP, inputs: Any) -> None:
        if self.before_forward(model) and self._handle is not None:
            self._handle.remove()


def _nothing() -> None:
    return None
