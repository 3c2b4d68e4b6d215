"""Tensors that stand in ``.grad`` when a pass begins, and that somebody keeps.

Plain DDP writes the average into the very tensor that stands there, so whoever holds it, or the buffer that all
gradients are views of, finds the averages in it, and sets them to zero or scales them by it. Here other tensors take
their places, and a bucket's memory is used again; so what is kept is put back with its average behind the pass. And
where ``.grad`` is set to None between the forward and the backward pass, what is kept stays as it is.

Which of both it is shows in the backward pass, when a parameter's gradient comes: so hooks are hung on these
parameters, and on no others.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch

from dear import _C
from dear._placeholders import LocalGrad, PendingGrad

Param = torch.nn.Parameter
Standing = list[tuple[Param, torch.Tensor]]
#: Of which an update in shards has taken its parts, out of ``.grad``, where placeholders follow them.
Taken = list[tuple[Param, "weakref.ref[torch.Tensor]"]]


def _uses(tensor: torch.Tensor) -> int:
    return sys.getrefcount(tensor)


def _found_alone() -> int:
    """What :func:`_uses` says of a tensor that only native code has beside the asker's name for it."""
    param = torch.nn.Parameter(torch.empty(0))
    param.grad = torch.empty(0)
    grad = param.grad
    return _uses(grad)


_ALONE = _found_alone()


def kept_elsewhere(params: Iterable[Param], buckets: Collection[torch.Tensor], *, views: bool) -> Standing:
    """The parameters whose ``.grad`` is a plain tensor that Python code holds, or a view of one, as of a flat buffer.

    buckets: of the layout; their memory is ours, and views of it are not found.
    views: DDP was built with ``gradient_as_bucket_view=True``, and puts tensors of its own in the place of others.
    """
    memory = set(map(memory_of, buckets))
    found: Standing = []
    with torch._C.DisableTorchFunctionSubclass():
        for param in params:
            grad = param.grad
            if grad is None or isinstance(grad, (LocalGrad, PendingGrad)) or grad.layout != torch.strided:
                continue
            in_bucket = memory_of(grad) in memory
            if views and not in_bucket:
                continue
            base = None if in_bucket else grad._base
            shared = not in_bucket and (_C.has_aliases([grad]) if base is None else _uses(base) > _ALONE)
            if shared or _uses(grad) > _ALONE:
                found.append((param, grad))
    return found


def lies_in(tensor: torch.Tensor, buckets: Iterable[torch.Tensor]) -> bool:
    """Whether it is a view of one of them."""
    return memory_of(tensor) in map(memory_of, buckets)


def memory_of(tensor: torch.Tensor) -> int:
    """Where its memory begins; 0 for a tensor that has none of its own, as one of several parts or a sparse one."""
    try:
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return 0


class Arrivals:
    """Calls back when gradients of some parameters come in the next backward pass, before ``.grad`` is written to."""

    def __init__(self) -> None:
        self.handles: list[Any] = []  # of hooks

    def clear(self) -> None:
        """Forgets all of them, as a forward pass begins."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def at(self, param: Param, call: Callable[[], None]) -> None:
        """Calls once; never for one that is frozen."""
        if not param.requires_grad:
            return

        def come(grad: torch.Tensor) -> None:
            handle.remove()
            call()

        with torch._C.DisableTorchFunctionSubclass():
            handle = param.register_hook(come)
        self.handles.append(handle)


def held_weakly(grads: Mapping[Param, torch.Tensor], taken: Taken) -> Taken:
    """These tensors, or what they are views of, and those of ``taken`` that are still there."""
    found = ((param, grad if grad._base is None else grad._base) for param, grad in grads.items())
    return [one for one in taken if one[1]() is not None] + [(param, weakref.ref(tensor)) for param, tensor in found]


def still_kept(taken: Taken) -> Taken:
    """Of these, those whose placeholders still stand, and whose tensors somebody keeps."""
    with torch._C.DisableTorchFunctionSubclass():
        return [one for one in taken if one[1]() is not None and isinstance(one[0].grad, LocalGrad)]
