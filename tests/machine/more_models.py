"""Models that tests/models.py does not have: what else a network can do with its parameters."""

from __future__ import annotations

import models
import torch
import torch.nn.utils.prune
from torch import nn


class Double(models.Mlp):
    """Of float64."""

    def __init__(self) -> None:
        super().__init__()
        self.double()


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


class Aliased(nn.Module):
    """Layers of one size, whose storages a program can tie."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.last = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Normed(Aliased):
    """Weights that are computed from other parameters whenever they are read."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.first)
        nn.utils.parametrizations.spectral_norm(self.last)


class Pruned(Aliased):
    """Weights that a hook computes from a parameter and a mask before each forward."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.prune.l1_unstructured(self.first, "weight", 0.3)


class Wide(nn.Module):
    """Large enough that exchanges last: two million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 2000)
        self.second = nn.Linear(2000, 1000)
        self.last = nn.Linear(1000, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))
