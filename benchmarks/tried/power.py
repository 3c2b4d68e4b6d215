"""Power-SGD with factors in few bits."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .messages import Answer, Message
from .method import Exchange, Method, orthonormal, random_basis
from .rounding import EXACT, ON_THE_WIRE

DECAY = 15 / 16  # of the running means of squares, as scale="element" has it
SMALLEST = 1 / 256  # of the mean unit: a unit is not smaller
LEADING = 8  # bits of the leading columns
UNITS = ("", "column", "element")


@dataclass(frozen=True)
class Choices:
    """p, q: bits of an element of either factor. lead: the share of the columns, from the first on, that have 8 bits in
    any case. unit: what a factor is divided by before it is rounded: nothing (""), for each ``column`` or ``element``
    the root of the running mean of its squares."""

    p: int = EXACT
    q: int = EXACT
    lead: float = 0.0
    unit: str = ""

    def __post_init__(self) -> None:
        if not {self.p, self.q} <= ON_THE_WIRE.keys() or self.unit not in UNITS or not 0 <= self.lead <= 1:
            raise ValueError(self)

    def leading(self, rank: int) -> int:
        """Columns."""
        return round(self.lead * rank)


class Power(Method):
    """P of this step's matrix, then all of the matrix that P spans: two messages (Vogels et al., 2019)."""

    choices: ClassVar[type] = Choices

    def __init__(self, rows: int, columns: int, rank: int, world: int, options: Choices) -> None:
        super().__init__(rows, columns, rank, world, options)
        self.right = random_basis(columns, rank)
        self.squares: dict[str, Tensor] = {}  # their running means, by factor

    @staticmethod
    def bits(rows: int, columns: int, rank: int, options: Choices) -> float:
        lead = options.leading(rank)
        return sum(
            size * (lead * ON_THE_WIRE[max(LEADING, own)] + (rank - lead) * ON_THE_WIRE[own])
            for size, own in ((rows, options.p), (columns, options.q))
        )

    def exchange(self, matrix: Tensor) -> Exchange:
        right = self.right
        if self.options.unit:  # P's columns are of one size then
            right = right / right.norm(dim=0).square().clamp_min(1e-20)
        p = yield from self._said("p", matrix @ right, self.options.p)
        left = orthonormal(p.result)
        q = yield from self._said("q", matrix.T @ left, self.options.q)
        self.right = q.result
        return left @ q.result.T, left @ q.own.T

    def learn(self, mean: Tensor) -> None:
        self.right = mean.T @ orthonormal(mean @ self.right)

    def _said(self, name: str, factor: Tensor, bits: int) -> Generator[Message, Answer, Answer]:
        """The mean of that factor."""
        unit = self._unit(name, factor)
        lead = self.options.leading(self.rank)
        answers = []
        for columns, own in ((slice(0, lead), max(LEADING, bits)), (slice(lead, self.rank), bits)):
            if columns.start < columns.stop:
                answers.append((yield Message(factor[:, columns], own, unit[:, columns])))
        answer = Answer(torch.cat([one.result for one in answers], 1), torch.cat([one.own for one in answers], 1))
        squares = answer.result.square()
        self.squares[name] = squares.lerp(self.squares.get(name, squares), DECAY)
        return answer

    def _unit(self, name: str, factor: Tensor) -> Tensor:
        squares = self.squares.get(name)
        if not self.options.unit or squares is None:
            return torch.ones(()).expand_as(factor)
        if self.options.unit == "column":
            squares = squares.mean(dim=0, keepdim=True)
        unit = squares.sqrt()
        return unit.clamp_min(SMALLEST * float(unit.mean()) + 1e-20).expand_as(factor)
