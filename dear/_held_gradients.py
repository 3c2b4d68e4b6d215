"""Gradients that somebody has kept, when the memory they stand in is about to be used again.

Plain DDP makes new tensors for ``.grad`` after it was set to None, so a gradient that is kept stays as it was. Here the
same buckets are used in every pass, and the same placeholders. So before a pass begins, what is still held of the last
one, and stands in ``.grad`` no more, gets memory of its own.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable

import torch

from dear import _ddp
from dear._attached import Attached, Param
from dear._placeholders import LocalGrad, PendingGrad

Shown = list[tuple[Param, "weakref.ref[torch.Tensor]"]]


def _references(placeholders: list[tuple[Param, torch.Tensor]]) -> list[int]:
    return [sys.getrefcount(item[1]) for item in placeholders]


def _found_alone() -> int:
    """What :func:`_references` counts of a placeholder that only native code has beside the list."""
    param = torch.nn.Parameter(torch.empty(0))
    param.grad = torch.empty(0)
    return _references([(param, param.grad)])[0]


_ALONE = _found_alone()


def part_with_held(attached: Attached, make: Callable[[int], torch.Tensor], *, late: bool = False) -> None:
    """Whoever keeps the placeholder of an earlier pass keeps that one, with its values where it has any; the parameter
    gets another.

    make: makes the placeholder of a place of the layout.
    late: the forward pass has run, and the backward pass has begun.
    """
    counts = _references(attached.placeholders)
    if max(counts, default=0) <= _ALONE:
        return
    changed = False
    placeholders = list(attached.placeholders)
    standing: list[Param] = []
    for index, count in enumerate(counts):
        if count <= _ALONE:
            continue
        param, placeholder = placeholders[index]
        with torch._C.DisableTorchFunctionSubclass():
            if _stands(placeholder, param.grad):
                standing.append(param)
                continue
        _move_out(placeholder)
        placeholders[index] = (param, make(index))
        changed = True
    if changed:
        attached.placeholders = placeholders
        if not _ddp.tracks_unused(attached.model):
            attached.native.replace_placeholders(placeholders)
    if standing and not late:
        _part_as_the_first_comes(attached, make, standing)


def _part_as_the_first_comes(attached: Attached, make: Callable[[int], torch.Tensor], params: list[Param]) -> None:
    """``.grad`` may be set to None between the forward and the backward pass, which writes to nothing of a parameter
    before its gradient comes."""
    begun = False

    def come() -> None:
        nonlocal begun
        if not begun:
            begun = True
            part_with_held(attached, make, late=True)

    for param in params:
        attached.arrivals.at(param, come)


def _stands(placeholder: torch.Tensor, grad: torch.Tensor | None) -> bool:
    """Whether ``.grad`` is the placeholder, or the plain tensor of the same memory that is shown in its place."""
    if grad is None or grad is placeholder or grad.layout != torch.strided:
        return grad is placeholder
    return grad.data_ptr() == placeholder.data_ptr()


def _move_out(placeholder: torch.Tensor) -> None:
    own = None
    if isinstance(placeholder, PendingGrad):
        placeholder.settle()  # and its values stand
        own = placeholder.plain = placeholder.plain.clone()
        placeholder.settle = _nothing
    with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
        if own is None:  # the values are nowhere: it is refused from now on
            own = torch.empty(placeholder.shape, dtype=placeholder.dtype, device=placeholder.device)
        placeholder.data = own


def hand_over(stood: Iterable[torch.Tensor], average: torch.Tensor) -> None:
    """Whoever has kept what stood in ``.grad`` keeps what takes its place, which is of other memory."""
    for kept in stood:
        if isinstance(kept, LocalGrad):  # whose values are nowhere: it is refused
            continue
        if isinstance(kept, PendingGrad):
            kept.plain, kept.settle = average, _nothing
        with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
            kept.data = average


def _nothing() -> None:
    pass


def part_with_shown(shown: Iterable[tuple[Param, weakref.ref[torch.Tensor]]]) -> None:
    """The same of plain tensors that stood in ``.grad``: they are views of the buckets."""
    for param, held in shown:
        grad = held()
        if grad is not None and param.grad is not grad:
            grad.data = grad.clone()
