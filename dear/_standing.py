"""Tensors that stand in ``.grad`` when a pass begins, and that somebody keeps.

Plain DDP writes the average into the very tensor that stands there, so whoever holds it, or the buffer that all
gradients are views of, finds the averages in it, and sets them to zero or scales them by it. Here other tensors take
their places, and a bucket's memory is used again; so what is kept is put back with its average behind the pass.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable

import torch

from dear._attached import Attached, Param
from dear._placeholders import LocalGrad, PendingGrad

Standing = list[tuple[Param, torch.Tensor]]


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

    buckets: of the layout; their memory is ours.
    views: DDP was built with ``gradient_as_bucket_view=True``, and puts tensors of its own in the place of others.
    """
    memory = {bucket.untyped_storage().data_ptr() for bucket in buckets}
    found: Standing = []
    with torch._C.DisableTorchFunctionSubclass():
        for param in params:
            grad = param.grad
            if grad is None or isinstance(grad, (LocalGrad, PendingGrad)) or grad.layout != torch.strided:
                continue
            in_bucket = grad.untyped_storage().data_ptr() in memory
            if views and not in_bucket:
                continue
            base = None if in_bucket else grad._base
            if _uses(grad) > _ALONE or (base is not None and _uses(base) > _ALONE):
                found.append((param, grad))
    return found


def put_back(attached: Attached, standing: Standing) -> None:
    """What stood in ``.grad`` stands there again, with the finished average that stands there now."""
    for param, kept in standing:
        average = param.grad
        if average is None or average is kept or param in attached.unused:
            continue
        if average.data_ptr() != kept.data_ptr():
            kept.copy_(average)
        param.grad = kept
