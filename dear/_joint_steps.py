"""Whether a step of the user's own lets the update of a parameter depend on others.

A norm over all gradients, a mean over parameters, a parameter's number in its group: with ``update="owned"`` a step is
given some of the parameters, and what it computes of them would be another value, without a word. No comparison around
a call shows that. So after some of the calls the step is made again: on each parameter by itself, and beside another
whose gradient is made large. Both must be the same update. Then everything it has changed is put back.

Both are compared as far as kernels round alike, since a step may update matrices of one shape in a batch. Where an
update depends on the other's gradient, it differs by far more than that; where on the number of parameters, by a factor
of two.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dear._optimizer import Groups

Run = Callable[[Groups, dict[Any, Any]], None]

_LARGE = 1e4  # the norm of the other's gradient: more than any to which gradients are clipped
_ALIKE = 0.25  # of an update
_EVERY = 1024


def is_tried(step: int) -> bool:
    """Whether the calls of this step, counted from 1, are made again: the first ones, and then fewer and fewer."""
    return step & (step - 1) == 0 or step % _EVERY == 0


def find_joint(run: Run, groups: Groups, state: dict[Any, Any]) -> torch.Tensor | None:
    """A parameter of these groups whose update depends on others; None if there is none.

    run: makes one update of some groups with some state.
    """
    for group in groups:
        used = [param for param in group["params"] if param.grad is not None]
        for param in used:
            if _is_joint(_Trial(run, group, param, state), param, used):
                return param
    return None


def _is_joint(trial: _Trial, param: torch.Tensor, used: list[torch.Tensor]) -> bool:
    peers = [other for other in used if other is not param and other.dim() == param.dim()]
    try:
        alone = trial.outcome(None)
        if peers:
            return not _alike(trial.before, alone, trial.outcome(min(peers, key=torch.numel)))
    except Exception:
        return True  # it wants others, or not this one
    try:
        return not _alike(trial.before, alone, trial.outcome(_twin(param)))
    except Exception:
        return False  # it knows its parameters, and the twin is none of them


class _Trial:
    """One parameter, of which updates are made that leave no trace."""

    def __init__(self, run: Run, group: dict[str, Any], param: torch.Tensor, state: dict[Any, Any]) -> None:
        self._run, self._group, self._param, self._state = run, group, param, state
        self.before = param.detach().clone(), _copied(state.get(param, {}))

    def outcome(self, peer: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
        """The parameter and its state after an update, made beside the peer."""
        tensors = [self._param] if peer is None else [peer, self._param]
        state: dict[Any, Any] = defaultdict(dict)
        for tensor in tensors:
            mine = self._state.get(tensor, self._state.get(self._param))  # a twin has its original's
            if mine is not None:
                state[tensor] = _copied(mine)
        with _put_back(tensors):
            if peer is not None:
                _make_large(peer.grad)
            self._run([{**self._group, "params": tensors}], state)
            return self._param.detach().clone(), state.get(self._param, {})


def _twin(param: torch.Tensor) -> torch.Tensor:
    """Another parameter, like this one in everything."""
    twin = torch.nn.Parameter(param.detach().clone())
    twin.__dict__.update(vars(param))
    assert param.grad is not None
    twin.grad = param.grad.clone()
    return twin


def _make_large(grad: Any) -> None:
    norm = grad.float().norm().item()
    if 0 < norm < float("inf"):
        grad.mul_(_LARGE / norm)
    else:
        grad.fill_(_LARGE / max(1, grad.numel()) ** 0.5)


@contextlib.contextmanager
def _put_back(tensors: list[torch.Tensor]) -> Iterator[None]:
    """Whatever is done inside with these tensors and their gradients has not been done."""
    kept = [(tensor, tensor.data, tensor.detach().clone(), tensor.grad) for tensor in tensors]
    grads = [None if grad is None else grad.clone() for *_, grad in kept]
    try:
        yield
    finally:
        for (tensor, home, values, grad), former in zip(kept, grads, strict=True):
            tensor.data = home
            tensor.data.copy_(values)
            tensor.grad = grad
            if grad is not None and former is not None:
                grad.data.copy_(former)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(each) for each in value)
    try:
        return copy.deepcopy(value)
    except Exception:  # what cannot be copied is not a part of what is compared
        return value


def _alike(before: Any, alone: Any, beside: Any) -> bool:
    """Whether two updates are the same one, from what was before."""
    if isinstance(alone, torch.Tensor):
        return isinstance(beside, torch.Tensor) and _alike_values(before, alone, beside)
    if isinstance(alone, dict):
        former = before if isinstance(before, dict) else {}
        return alone.keys() == beside.keys() and all(
            _alike(former.get(key), each, beside[key]) for key, each in alone.items()
        )
    if isinstance(alone, (list, tuple)):
        olds = before if isinstance(before, (list, tuple)) and len(before) == len(alone) else [None] * len(alone)
        return len(alone) == len(beside) and all(map(_alike, olds, alone, beside))
    if isinstance(alone, float) and isinstance(beside, float):
        start, *ends = (torch.tensor(each, dtype=torch.float64) for each in (before or 0.0, alone, beside))
        return _alike_values(start, *ends)
    return alone == beside if isinstance(alone, (bool, int, str)) else True


def _alike_values(before: Any, alone: torch.Tensor, beside: torch.Tensor) -> bool:
    if alone.shape != beside.shape or alone.dtype != beside.dtype:
        return False
    if torch.equal(alone, beside):
        return True
    known = isinstance(before, torch.Tensor) and before.shape == alone.shape
    wide = torch.complex128 if alone.is_complex() else torch.float64
    one, other = alone.to(wide), beside.to(wide)
    start = before.to(wide) if known else torch.zeros_like(one)
    if not all(bool(torch.isfinite(each).all()) for each in (start, one, other)):
        return True  # which says nothing
    rounds = alone.is_floating_point() or alone.is_complex()
    rounding = torch.finfo(alone.dtype).eps * one.norm() if rounds else 0.0
    return bool((one - other).norm() <= _ALIKE * (one - start).norm() + 4 * rounding)
