"""Shampoo, vectorised: curvature by the mean row and the mean column of each matrix's gradient.

Source: Zhang et al., "Eva", 2023, its form Eva-s; Gupta, Koren, Singer, "Shampoo", 2018. The authors' code takes one
vector for each dimension of a convolution's weight; here a weight is a matrix [outputs, the rest], as for the others.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dear._names import named_parameters
from dear.preconditioning import Param
from precondition import eva_parts
from precondition.eva_means import Running, Shaped, lies_by_rows
from precondition.eva_parts import Rectangle
from precondition.eva_preconditioner import RankOnePreconditioner
from precondition.eva_rank_one import Correction, RankOneStep, Settings, Total

_log = logging.getLogger(__name__)


class ShampooStep(RankOneStep):
    """With u and v the running means of the gradient's columns and rows: w = u (uᵀ G v) / (‖u‖² ‖v‖² + γ), a = v."""

    def __init__(self, running: Running, settings: Settings) -> None:
        super().__init__(running, settings)
        self._row_sums = self.vectors.zeros(self.vectors.rows)
        self._column_sums = self.vectors.zeros(self.vectors.columns)
        self._ones = torch.ones_like(self._column_sums)

    def look(self, parts: Sequence[Rectangle]) -> None:
        self.look_along(parts, self._ones, self._row_sums)
        eva_parts.add_column_sums(parts, self._column_sums)

    def correction(self, total: Total) -> Correction:
        vectors, running = self.vectors, self.running
        shares = [self._row_sums, self._column_sums, self.squares]
        row_sums, column_sums, squares = total(torch.cat(shares)).split([len(each) for each in shares])
        used = squares.isfinite() & (squares > 0)
        running.update(
            used.to(vectors.dtype),
            column_sums / vectors.to_columns(vectors.block_rows),
            row_sums / vectors.to_rows(vectors.block_columns),
            self.settings.factor_decay,
        )
        products = vectors.zeros(vectors.rows)
        eva_parts.add_products(self.parts, running.columns, products)
        inner = total(vectors.dot_rows(running.rows, products))
        norms = vectors.square_norms(running.columns) * vectors.dot_rows(running.rows, running.rows)
        scale = inner / (norms + self.settings.damping)
        return Correction(running.rows * vectors.to_rows(scale), scale * inner, scale.square() * norms, squares)


@dataclass(eq=False)
class Weight:
    """A parameter of two dimensions or more, as a matrix."""

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None = None
    blocks: int = 1

    @property
    def params(self) -> tuple[nn.Parameter, ...]:
        """The weight alone."""
        return (self.weight,)


class Shampoo(RankOnePreconditioner):
    """Shampoo, vectorised: as :class:`precondition.Eva`, but of the gradient alone. Serves every parameter of two
    dimensions or more, of whatever module, as a matrix [outputs, the rest]; others are left to the optimizer.

    With u and v the running means of the columns and of the rows of the averaged gradient G, it becomes
    ν (G - u vᵀ · (uᵀ G v) / (‖u‖² ‖v‖² + γ)) / γ. Nothing is captured; the first message of a step has the sums of all
    rows and columns, the second one number for each parameter.

    Args:
        damping, factor_decay, kl_clip: as of :class:`precondition.Eva`. Gradients' means are small numbers, and so is
            the damping that leaves anything of them.
    """

    step_kind = ShampooStep
    captures = False

    def __init__(self, damping: float = 1e-6, factor_decay: float = 0.05, kl_clip: float | None = None) -> None:
        super().__init__(damping, factor_decay, kl_clip)

    def served(self, root: nn.Module, trained: set[Param]) -> list[Shaped]:
        found = [Weight(name, param) for name, param in named_parameters(root) if param in trained and param.dim() > 1]
        return [each for each in found if lies_by_rows(each)]

    def name_left_out(self, root: nn.Module, served: Sequence[Shaped], trained: set[Param]) -> None:
        weights = {each.weight for each in served}
        other = [n for n, p in named_parameters(root) if p in trained and p.dim() > 1 and p not in weights]
        if other:
            _log.warning("These parameters are not preconditioned, and left to the optimizer: %s.", ", ".join(other))
