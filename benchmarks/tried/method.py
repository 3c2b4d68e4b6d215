"""What a method of compressing one matrix is.

``exchange`` is a generator: it yields a message, is sent the answer, and returns what the ranks make of the matrix
together, and this rank's part of that.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .messages import Answer, Message

Exchange = Generator[Message, Answer, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class NoChoices:
    """For methods that leave none."""


class Method(ABC):
    """One matrix's state: [n, m], n <= m.

    Args:
        rows: n.
        columns: m.
        rank: columns of each factor, at most n.
        world: ranks.
        options: one of the class's ``choices``.
    """

    #: What may be chosen, each with a default: a frozen dataclass of numbers and words.
    choices: ClassVar[type] = NoChoices

    def __init__(self, rows: int, columns: int, rank: int, world: int, options: Any) -> None:
        self.rows, self.columns, self.rank, self.options = rows, columns, rank, options
        self.world = world

    @abstractmethod
    def exchange(self, matrix: Tensor) -> Exchange:
        """Of this rank's matrix, with what was not sent of the last ones."""

    @abstractmethod
    def learn(self, mean: Tensor) -> None:
        """From a step whose matrix was sent exactly."""

    @staticmethod
    @abstractmethod
    def bits(rows: int, columns: int, rank: int, options: Any) -> float:
        """Sent for a matrix in a step, on average, each way."""


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of these columns, or where they depend on each other of more."""
    return torch.linalg.qr(columns)[0]


def random_basis(rows: int, columns: int, seed: int = 1) -> Tensor:
    """The same on every rank."""
    return orthonormal(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))
