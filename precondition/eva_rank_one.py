"""What Eva and its like share: curvature of rank one, so that every layer's gradient is corrected by one rank.

A preconditioned gradient is ν (G - w aᵀ) / γ: ``a`` is a running mean of the layer's inputs (Shampoo: of its gradient's
columns), ``w`` is the kind's own, γ the damping, and ν one number for all layers, which bounds the size of the update.

Note [Small exchanges]
A step has one message of the mean vectors of all layers, averaged over the ranks: it is submitted when the backward
pass ends, in the lane that is idle then, and travels while the last gradients are reduced. What the correction asks of
gradients follows as they come; the ranks' shares of it are added up in a second message: for Eva of two numbers a
layer, ⟨b aᵀ, G⟩ and ‖G‖², since the third, ‖a‖² ‖b‖², is known to all. Only then can a gradient be changed: ν is of all
layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from precondition import _checks, eva_parts
from precondition.eva_means import Running
from precondition.eva_parts import Rectangle, to_device

#: Adds up the ranks' shares of a flat tensor.
Total = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """What all kinds are told."""

    damping: float
    factor_decay: float
    kl_clip: float | None

    def __post_init__(self) -> None:
        _checks.check_positive(damping=self.damping, **({} if self.kl_clip is None else {"kl_clip": self.kl_clip}))
        _checks.check_decay(self.factor_decay)


class Correction(NamedTuple):
    """What is taken off the gradients, and what is known of them."""

    rows: Tensor  # w of all layers; G becomes G - w aᵀ
    inner: Tensor  # ⟨w aᵀ, G⟩ of each block
    outer: Tensor  # ‖w aᵀ‖² of each block
    squares: Tensor  # ‖G‖² of each layer


class RankOneStep(ABC):
    """The gradients of one step, which come a few at a time."""

    def __init__(self, running: Running, settings: Settings) -> None:
        self.vectors, self.running, self.settings = running.vectors, running, settings
        self.parts: list[Rectangle] = []
        self.squares = running.vectors.zeros(len(running.vectors.matrices))  # ‖G‖² of each layer: this rank's share

    def take(self, parts: Sequence[Rectangle]) -> None:
        """Some of this rank's averaged gradients have come."""
        self.parts += parts
        self.look(parts)

    def look_along(self, parts: Sequence[Rectangle], columns: Tensor, products: Tensor) -> None:
        """Adds G a of these to ``products``, and ‖G‖² to :attr:`squares`."""
        eva_parts.add_products_and_squares(parts, columns, products, self.squares, self.vectors)

    def finish(self, learning_rates: Sequence[float], total: Total) -> None:
        """All have come: changes them. Collective."""
        correction = self.correction(total)
        factor = self._scale(correction, learning_rates) / self.settings.damping
        eva_parts.subtract(self.parts, correction.rows, self.running.columns, factor)

    @abstractmethod
    def look(self, parts: Sequence[Rectangle]) -> None:
        """Computes this rank's share of what the correction asks of these, :attr:`squares` among it."""

    @abstractmethod
    def correction(self, total: Total) -> Correction:
        """The correction of all. Collective."""

    def _scale(self, correction: Correction, learning_rates: Sequence[float]) -> Tensor:
        """ν: min(1, √(κ / Σ lr² ⟨pre, G⟩)), or without κ √(Σ ‖G‖² / Σ ‖pre‖²).

        Of pre = (G - w aᵀ) / γ both sums follow from what is known: γ ⟨pre, G⟩ = ‖G‖² - ⟨w aᵀ, G⟩ and
        γ² ‖pre‖² = ‖G‖² - 2 ⟨w aᵀ, G⟩ + ‖w aᵀ‖². Rounding must not make them negative. A layer that is not finite does
        not count: GradScaler skips the step of its optimizer alone.
        """
        settings, vectors = self.settings, self.vectors
        tiny = torch.finfo(vectors.dtype).tiny
        removed = vectors.sum_blocks(correction.inner)
        change = correction.squares - removed
        counts = change.isfinite()
        if settings.kl_clip is None:
            after = change - removed + vectors.sum_blocks(correction.outer)
            before, after = (torch.where(counts, each, 0).sum() for each in (correction.squares, after))
            return settings.damping * (before / after.clamp_(min=tiny)).sqrt_()
        change = torch.where(counts, change, 0)
        if len(set(learning_rates)) == 1:
            size = change.sum() * learning_rates[0] ** 2
        else:
            size = change.dot(to_device([lr**2 for lr in learning_rates], change.dtype, change.device))
        return (settings.kl_clip * settings.damping / size.clamp_(min=tiny)).sqrt_().clamp_(max=1.0)
