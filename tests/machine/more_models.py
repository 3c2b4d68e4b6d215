"""Models that tests/models.py does not have: what else a network can do with its parameters."""

from __future__ import annotations

import torch
from torch import nn


class Shared(nn.Module):
    """One layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.last = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(torch.tanh(self.first(x)))))


class Bare(nn.Module):
    """Parameters of the root and of lists, which no module of their own reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.ones(16))
        self.rows = nn.ParameterList(nn.Parameter(torch.full((16,), 0.5)) for _ in range(2))
        self.last = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) * self.scale
        for row in self.rows:
            x = torch.tanh(x + row)
        return self.last(x)


class Noisy(nn.Module):
    """Dropout draws from the global generator, which nobody else may use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(torch.relu(self.first(x))))
