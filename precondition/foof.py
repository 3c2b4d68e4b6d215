"""FOOF, vectorised: curvature by one vector of inputs for each layer; output gradients are left out of it.

Source: Zhang et al., "Eva", 2023, its form Eva-f; Benzing, "Gradient Descent on Neurons and its Link to Approximate
Second-Order Optimization", 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from precondition.eva_means import Running
from precondition.eva_parts import Rectangle
from precondition.eva_preconditioner import RankOnePreconditioner
from precondition.eva_rank_one import Correction, RankOneStep, Settings, Total


class FoofStep(RankOneStep):
    """w = G a / (‖a‖² + γ): Sherman and Morrison's formula for (I ⊗ a aᵀ + γ I)⁻¹."""

    def __init__(self, running: Running, settings: Settings) -> None:
        super().__init__(running, settings)
        self._products = self.vectors.zeros(self.vectors.rows)

    def look(self, parts: Sequence[Rectangle]) -> None:
        self.look_along(parts, self.running.columns, self._products)

    def correction(self, total: Total) -> Correction:
        vectors = self.vectors
        shares = [self._products, self.squares]
        products, squares = total(torch.cat(shares)).split([len(each) for each in shares])
        norms = vectors.square_norms(self.running.columns)
        rows = products / (vectors.to_rows(norms) + self.settings.damping)
        inner, outer = vectors.dot_rows(rows, products), vectors.dot_rows(rows, rows) * norms
        return Correction(rows, inner, outer, squares)


class FOOF(RankOnePreconditioner):
    """FOOF, vectorised: as :class:`precondition.Eva`, but of inputs alone.

    A layer's averaged gradient G becomes ν (G - G a aᵀ / (‖a‖² + γ)) / γ. The second message of a step has a number for
    each output of each layer, G a.

    Args:
        damping, factor_decay, kl_clip: as of :class:`precondition.Eva`.
    """

    step_kind = FoofStep
    with_rows = False

    def __init__(self, damping: float = 0.03, factor_decay: float = 0.05, kl_clip: float | None = 0.001) -> None:
        super().__init__(damping, factor_decay, kl_clip)
