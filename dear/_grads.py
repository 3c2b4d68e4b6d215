"""Whether ``.grad`` still is what the last backward pass left there, when step() is about to use it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch

StandIns = list[tuple[torch.nn.Parameter, torch.Tensor]]


def look(stand_ins: StandIns, skip: set[torch.nn.Parameter]) -> Literal["ours", "none", "changed"]:
    """What the parameters but ``skip`` have in ``.grad``: all what the engine put there (or views of that memory), all
    nothing, or something else."""
    ours = none = False
    for param, stand_in in stand_ins:
        if param in skip:
            continue
        grad = param.grad
        if grad is None:
            none = True
        elif grad is stand_in or grad.data_ptr() == stand_in.data_ptr():
            ours = True
        else:
            return "changed"
    if ours and none:
        return "changed"
    return "none" if none else "ours"


def refuse_unreduced(params: Iterable[torch.nn.Parameter]) -> None:
    """To be called when no backward pass has delivered gradients since the last step: there should be none.

    Raises:
        RuntimeError: there are.
    """
    if any(param.grad is not None for param in params):
        raise RuntimeError(
            "optimizer.step() found gradients that were not reduced since the last step: run backward() outside "
            "model.no_sync(), and zero_grad() after each step."
        )


def refuse_changes() -> None:
    """Raises the sentence for a gradient that was replaced where only its shards count."""
    raise RuntimeError(
        'A gradient was set to None or to another tensor after backward(), which has no effect with update="sharded", '
        'since the average exists only in shards: use dear.attach(..., update="replicated").'
    )
