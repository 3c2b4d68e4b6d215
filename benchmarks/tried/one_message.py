"""Low-rank methods that send one message a step."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .messages import Message
from .method import Exchange, Method, orthonormal, random_basis


@dataclass(frozen=True)
class Pairs:
    """pairs: of factors that take turns, two steps each."""

    pairs: int = 1


class ACP(Method):
    """One factor a step, on a basis from the other one of the step before (Zhang et al., 2023)."""

    choices: ClassVar[type] = Pairs

    def __init__(self, rows: int, columns: int, rank: int, world: int, options: Pairs) -> None:
        super().__init__(rows, columns, rank, world, options)
        self.bases = [random_basis(columns, rank, seed) for seed in range(options.pairs)]  # of either side, in turn
        self.steps = 0

    @staticmethod
    def bits(rows: int, columns: int, rank: int, options: Pairs) -> float:
        return 32 * rank * (rows + columns) / 2

    def exchange(self, matrix: Tensor) -> Exchange:
        turn, flipped = self.steps // 2 % len(self.bases), self.steps % 2 == 1
        self.steps += 1
        basis = self.bases[turn]
        answer = yield Message((matrix.T if flipped else matrix) @ basis)
        self.bases[turn] = orthonormal(answer.result)
        result, own = answer.result @ basis.T, answer.own @ basis.T
        return (result.T, own.T) if flipped else (result, own)

    def learn(self, mean: Tensor) -> None:
        self.bases = [orthonormal(mean.T @ (mean @ basis)) for basis in self.bases]


class Sketch(Method):
    """Rows and columns at once, on bases from the step before: M is taken for L Lᵀ M + M R Rᵀ - L Lᵀ M R Rᵀ."""

    def __init__(self, rows: int, columns: int, rank: int, world: int, options: Any) -> None:
        super().__init__(rows, columns, rank, world, options)
        self.left, self.right = random_basis(rows, rank), random_basis(columns, rank)

    @staticmethod
    def bits(rows: int, columns: int, rank: int, options: Any) -> float:
        return 32 * rank * (rows + columns)

    def exchange(self, matrix: Tensor) -> Exchange:
        both = torch.cat([matrix @ self.right, matrix.T @ self.left])
        answer = yield Message(both)
        result, own = (self._together(*one.split([self.rows, self.columns])) for one in (answer.result, answer.own))
        of_columns, of_rows = answer.result.split([self.rows, self.columns])
        self.left, self.right = orthonormal(of_columns), orthonormal(of_rows)
        return result, own

    def _together(self, of_columns: Tensor, of_rows: Tensor) -> Tensor:
        """of_columns: M R [n, r]. of_rows: Mᵀ L [m, r]."""
        core = self.left.T @ of_columns
        return self.left @ of_rows.T + (of_columns - self.left @ core) @ self.right.T

    def learn(self, mean: Tensor) -> None:
        self.left = orthonormal(mean @ self.right)
        self.right = orthonormal(mean.T @ self.left)


class Nystrom(Sketch):
    """The same message, and the rest extrapolated: M is taken for (M R) (Lᵀ M R)⁺ (Lᵀ M), the generalised Nyström form
    (Nakatsukasa, 2020), whose small matrix is inverted where it is not near singular."""

    SMALLEST = 1e-2  # of the largest singular value: smaller ones count as 0

    def _together(self, of_columns: Tensor, of_rows: Tensor) -> Tensor:
        inverse = torch.linalg.pinv(self.left.T @ of_columns, rtol=self.SMALLEST)
        return of_columns @ inverse @ of_rows.T

    def exchange(self, matrix: Tensor) -> Exchange:
        result, _ = yield from super().exchange(matrix)
        return result, result  # no rank has a part of it: the form is not linear


@dataclass(frozen=True)
class Iterated:
    """iterations: of a subspace, on a matrix that a rank has for itself."""

    iterations: int = 1


class Local(Method):
    """Every rank approximates its own matrix and sends both factors: one message, gathered by all. It has as many
    columns as Power-SGD's bytes of that rank allow: the same of two workers, half of four."""

    choices: ClassVar[type] = Iterated

    def __init__(self, rows: int, columns: int, rank: int, world: int, options: Iterated) -> None:
        super().__init__(rows, columns, self._columns(rank, world), world, options)
        self.right = random_basis(columns, self.rank)

    @staticmethod
    def _columns(rank: int, world: int) -> int:
        return max(1, 2 * rank // world)

    @staticmethod
    def bits(rows: int, columns: int, rank: int, options: Iterated) -> float:
        return 32 * rank * (rows + columns)

    def exchange(self, matrix: Tensor) -> Exchange:
        own, self.right = self._approximated(matrix, self.right)
        answer = yield Message(own)
        return answer.result, own

    def learn(self, mean: Tensor) -> None:
        _, self.right = self._approximated(mean, self.right)

    def _approximated(self, matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """By subspace iteration from the right factor; and the new one."""
        for _ in range(self.options.iterations):
            left = orthonormal(matrix @ right)
            right = matrix.T @ left
        return left @ right.T, right


class Owner(Local):
    """Every rank approximates its own matrix and sends both factors to the matrix's owner, who approximates their mean
    in the same way, and sends that to all. What either leaves out is kept there. Each sends as many bytes as Power-SGD
    of that rank does, whatever the number of workers."""

    @staticmethod
    def _columns(rank: int, world: int) -> int:
        return rank

    def __init__(self, rows: int, columns: int, rank: int, world: int, options: Iterated) -> None:
        super().__init__(rows, columns, rank, world, options)
        self.owners_right, self.owners_error = self.right, torch.zeros(rows, columns)  # here every rank computes it

    def exchange(self, matrix: Tensor) -> Exchange:
        mean, own = yield from super().exchange(matrix)
        mean = mean + self.owners_error
        result, self.owners_right = self._approximated(mean, self.owners_right)
        self.owners_error = mean - result
        return result, own

    def learn(self, mean: Tensor) -> None:
        super().learn(mean)
        self.owners_right = self.right


@dataclass(frozen=True)
class Averaged:
    """fresh: the share of the columns that come from a fixed basis, in turn. decay: of the running average."""

    fresh: float = 0.25
    decay: float = 0.9


class Average(Method):
    """The shorter factor alone, on a basis that every rank makes of what it has received: the leading columns of the
    running average of results, and some of a fixed basis in turn. It has as many columns as Power-SGD's bytes of that
    rank allow."""

    choices: ClassVar[type] = Averaged

    def __init__(self, rows: int, columns: int, rank: int, world: int, options: Averaged) -> None:
        super().__init__(rows, columns, min(columns, rank * (rows + columns) // rows), world, options)
        self.average = torch.zeros(rows, columns)
        self.fixed, self.next = random_basis(columns, columns), 0
        self.leading = random_basis(columns, rank)

    @staticmethod
    def bits(rows: int, columns: int, rank: int, options: Averaged) -> float:
        return 32 * rank * (rows + columns)

    def exchange(self, matrix: Tensor) -> Exchange:
        basis = self._basis()
        answer = yield Message(matrix @ basis)
        result = answer.result @ basis.T
        self.learn(result)
        return result, answer.own @ basis.T

    def learn(self, mean: Tensor) -> None:
        self.average = torch.lerp(mean, self.average, self.options.decay)

    def _basis(self) -> Tensor:
        fresh = max(1, round(self.options.fresh * self.rank))
        kept = self.rank - fresh
        turn = [(self.next + index) % self.columns for index in range(fresh)]
        self.next = (self.next + fresh) % self.columns
        self.leading = orthonormal(self.average.T @ (self.average @ self.leading))
        return orthonormal(torch.cat([self.leading[:, :kept], self.fixed[:, turn]], 1))
