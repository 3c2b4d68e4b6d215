"""A forward pass that is open while DDP's reducer is replaced: its backward pass would be reduced by nobody.

DDP prepares its reducer in a forward pass, and reduces the next backward pass; a new reducer is not prepared. Whether
that pass will have a backward pass at all is not known then (it may have been an evaluation), so it is refused when it
has.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from dear import _C

__all__ = ["is_open", "refuse_backward"]


def is_open(model: DDP) -> bool:
    """Whether a forward pass has prepared the reducer, and no backward pass has been reduced since."""
    return bool(_C.expects_gradients(model.reducer))


EARLIER = (
    "The forward pass of this backward pass ran before dear.attach(), engine.detach() or the removal of a "
    "compressor gave DistributedDataParallel a new reducer, which would not reduce it: call them behind "
    "optimizer.step(), before the next forward pass."
)


def refuse_backward(model: DDP, params: Iterable[torch.nn.Parameter], sentence: str = EARLIER) -> list[Any]:
    """Has a backward pass that the reducer does not expect raise, on every rank, as that of an earlier forward pass
    where the reducer is new. The first one that it expects ends this.

    Returns the handles of the hooks, none once this has ended.

    Raises, from ``backward()``:
        RuntimeError: what ``sentence`` says.
    """
    of = weakref.ref(model)
    handles: list[Any] = []

    def check(param: torch.Tensor) -> None:
        model = of()
        # DDP notes in a forward pass under no_sync() that it is one, and does not reduce the backward pass.
        if model is None or is_open(model) or not model.require_forward_param_sync:
            for handle in handles:
                handle.remove()
            handles.clear()
            return
        raise RuntimeError(sentence)

    handles += [param.register_post_accumulate_grad_hook(check) for param in params if param.requires_grad]
    return handles
