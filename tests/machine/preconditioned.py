"""A preconditioner under plain DDP, as a script calls it, to be compared with one that ``dear.attach`` was given.

Not DP-KFAC, whose result follows from who owns which layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import precondition

KINDS: dict[str, Callable[[], Any]] = {
    "eva": precondition.Eva,
    "kfac": lambda: precondition.KFAC(inverse_every=2),
}


class ByHand:
    """``preconditioner.step()`` between each backward pass and the first optimizer's step."""

    def __init__(self, kind: str, model: DDP, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.preconditioner = KINDS[kind]()
        precondition.register(model, optimizers, self.preconditioner)
        self._came = False  # a gradient, since the last step
        params = [param for param in model.parameters() if param.requires_grad]
        self._handles = [param.register_post_accumulate_grad_hook(self._note) for param in params]
        self._handles.append(optimizers[0].register_step_pre_hook(self._before_step))

    def release(self) -> None:
        """Back to plain DDP."""
        self.preconditioner.release()
        for handle in self._handles:
            handle.remove()

    def _note(self, param: torch.Tensor) -> None:
        self._came = True

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, options: Any) -> Any:
        closure = args[1] if len(args) > 1 else None
        if closure is None:
            self._step()
            return None

        def preconditioned() -> Any:
            loss = closure()
            self._step()
            return loss

        return (optimizer, preconditioned), options

    def _step(self) -> None:
        if self._came:
            self.preconditioner.step()
            self._came = False
