"""Eva: curvature by one vector of inputs and one of output gradients for each layer.

Source: Zhang et al., "Eva: Practical Second-order Optimization with Kronecker-vectorized Approximation", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dear import _C
from precondition import eva_parts
from precondition.eva_means import Running
from precondition.eva_parts import Rectangle
from precondition.eva_preconditioner import RankOnePreconditioner
from precondition.eva_rank_one import Correction, RankOneStep, Settings, Total


class EvaStep(RankOneStep):
    """w = b (bᵀ G a) / (‖a‖² ‖b‖² + γ): Sherman and Morrison's formula for (b bᵀ ⊗ a aᵀ + γ I)⁻¹."""

    def __init__(self, running: Running, settings: Settings) -> None:
        super().__init__(running, settings)
        self._products = self.vectors.zeros(self.vectors.rows)

    def look(self, parts: Sequence[Rectangle]) -> None:
        self.look_along(parts, self.running.columns, self._products)

    def finish(self, learning_rates: Sequence[float], total: Total) -> None:
        """As that of the base class; on the host :meth:`correction` and what follows from it are one native call."""
        vectors, running, settings = self.vectors, self.running, self.settings
        if not running.rows.is_cpu:
            super().finish(learning_rates, total)
            return
        inner, squares = self._totals(total)
        rows, factor = _C.eva_correction(
            running.columns, running.rows, inner, squares, vectors.first_column_of_block, vectors.first_row_of_block,
            vectors.first_block, [each.bias for each in vectors.matrices], list(learning_rates), settings.damping,
            settings.kl_clip,
        )  # fmt: skip
        eva_parts.subtract_on_host(self.parts, rows, running.columns, factor)

    def _totals(self, total: Total) -> tuple[Tensor, Tensor]:
        """bᵀ G a of each block, and ‖G‖² of each layer."""
        share = self.vectors.dot_rows(self.running.rows, self._products)
        inner, squares = total(torch.cat([share, self.squares])).split([len(share), len(self.squares)])
        return inner, squares

    def correction(self, total: Total) -> Correction:
        vectors, running = self.vectors, self.running
        inner, squares = self._totals(total)
        norms = vectors.square_norms(running.columns) * vectors.dot_rows(running.rows, running.rows)
        scale = inner / (norms + self.settings.damping)
        return Correction(running.rows * vectors.to_rows(scale), scale * inner, scale.square() * norms, squares)


class Eva(RankOnePreconditioner):
    """Eva: K-FAC with one vector in the place of each factor. Serves linear layers and convolutions, their biases too.

    A layer's averaged gradient G [outputs, inputs + 1] (the last column is the bias's) becomes
    ν (G - b aᵀ · (bᵀ G a) / (‖a‖² ‖b‖² + γ)) / γ, where ``a`` is a running mean of its inputs and ``b`` one of the
    gradients of its outputs, over samples, positions and ranks. A step costs one message of all these vectors and one
    of two numbers a layer; no rank needs a whole matrix.

    Args:
        damping: γ, above 0. Larger: nearer to the plain gradient.
        factor_decay: the weight of earlier steps in the running means, from 0 to below 1. Larger: smoother and later.
        kl_clip: κ: ν is min(1, √(κ / Σ lr² ⟨preconditioned, G⟩)), so that an update changes the model's output no more
            than so far. None: ν gives the preconditioned gradients of all layers together the norm of the plain ones.
        grad_scaler: the ``torch.amp.GradScaler`` that scales the loss, if one does: gradients of outputs are scaled,
            too.

    Raises:
        ValueError: an argument is out of its range.
    """

    step_kind = EvaStep

    def __init__(
        self,
        damping: float = 0.03,
        factor_decay: float = 0.05,
        kl_clip: float | None = 0.001,
        *,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        super().__init__(damping, factor_decay, kl_clip, grad_scaler)
