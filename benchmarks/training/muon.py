"""Muon as users have it: torch's for the matrices of hidden layers, AdamW for embeddings, the head and vectors."""

from typing import Any

import torch
from torch import nn

ADAMW_SHARE = 1 / 40  # of Muon's learning rate: 5e-4 beside 0.02


class Together:
    """Several optimizers that step one after another, used as if they were one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = list(optimizers)

    def step(self) -> None:
        """One step of each."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Of each."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    @property
    def state(self) -> dict[Any, Any]:
        """Of all, by parameter."""
        return {param: state for optimizer in self.optimizers for param, state in optimizer.state.items()}


def muon_and_adamw(model: nn.Module, lr: float) -> Together:
    """The weights of linear layers but for the last, which is the head, by Muon, and the others by AdamW."""
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    hidden = set(linear[:-1])
    rest = [param for param in model.parameters() if param not in hidden]
    return Together(torch.optim.Muon(linear[:-1], lr=lr), torch.optim.AdamW(rest, lr=lr * ADAMW_SHARE))
